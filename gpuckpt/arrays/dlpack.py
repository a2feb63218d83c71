"""Look at a DLPack tensor's memory in place, whatever its element type.

numpy's and cupy's own `from_dlpack` refuse bfloat16 and float8, which is what
training states are made of.  The layout is that of DLPack 1.1
(https://dmlc.github.io/dlpack/latest/c_api.html); only the unversioned capsule
is asked for, since its tensor struct is all that is needed.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_CODES = {0: "int", 1: "uint", 2: "float", 5: "complex"}
_EXACT = {
    (4, 16): "bfloat16",
    (6, 8): "bool",
    (7, 8): "float8_e3m4",
    (8, 8): "float8_e4m3",
    (9, 8): "float8_e4m3b11fnuz",
    (10, 8): "float8_e4m3fn",
    (11, 8): "float8_e4m3fnuz",
    (12, 8): "float8_e5m2",
    (13, 8): "float8_e5m2fnuz",
    (14, 8): "float8_e8m0fnu",
}


@dataclass(frozen=True, slots=True)
class Memory:
    """Strided elements at an address; valid while `owner` lives.

    `strides` are in bytes, `dtype` is a name of `gpuckpt.dtypes`, and
    `device` None for the host, else the ordinal of a CUDA device.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    itemsize: int
    device: int | None
    owner: object


def look(producer: Any, *, ordered: bool = True) -> Memory | str:
    """The memory behind `producer`, or a reason why it can't be looked at.

    If it is `ordered`, the producer orders CuPy's current stream after what it
    has given to streams of its own.
    """
    try:
        device_type, device_id = producer.__dlpack_device__()
        if device_type not in (CPU, CUDA, CUDA_HOST, CUDA_MANAGED):
            return f"it lies on a device of DLPack type {device_type}, neither host nor CUDA"
        on_host = device_type in (CPU, CUDA_HOST)
        # -1: no order.
        stream = {} if on_host else {"stream": _current_stream(device_id) if ordered else -1}
        capsule = producer.__dlpack__(**stream)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        return f"its memory can't be looked at through DLPack ({error})"
    tensor = _tensor_of(capsule)
    name = _name(tensor.dtype)
    if name is None:
        return f"DLPack element type {tensor.dtype.code}:{tensor.dtype.bits} is not known here"
    itemsize = tensor.dtype.bits // 8
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    strides = _strides(tensor, shape)
    return Memory(
        (tensor.data or 0) + tensor.byte_offset,
        shape,
        tuple(stride * itemsize for stride in strides),
        name,
        itemsize,
        None if on_host else device_id,
        (producer, capsule),
    )


def _current_stream(device_id: int) -> int:
    """CuPy's, by DLPack's number: the legacy default stream is 1."""
    import cupy

    with cupy.cuda.Device(device_id):
        return int(cupy.cuda.get_current_stream().ptr) or 1


def _tensor_of(capsule: object) -> _Tensor:
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    # The capsule isn't consumed: its own destructor gives the tensor back.
    return _Tensor.from_address(pointer(capsule, b"dltensor"))


def _name(dtype: _DataType) -> str | None:
    if dtype.lanes != 1 or dtype.bits % 8:
        return None
    if dtype.code in _CODES and dtype.bits >= 8:
        return f"{_CODES[dtype.code]}{dtype.bits}"
    return _EXACT.get((dtype.code, dtype.bits))


def _strides(tensor: _Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    if tensor.strides:
        return tuple(tensor.strides[axis] for axis in range(tensor.ndim))
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))
