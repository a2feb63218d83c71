"""Recognise a leaf of the state as an array, and look at its memory in place."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpuckpt.arrays import dlpack
from gpuckpt.arrays.torched import detached, is_torch
from gpuckpt.boxes import Box, Shape, whole_box
from gpuckpt.dtypes import name_of, to_numpy
from gpuckpt.errors import UnsupportedError
from gpuckpt.record import record
from gpuckpt.spec import Spec

if TYPE_CHECKING:
    import cupy

    Array = npt.NDArray[np.generic] | cupy.ndarray
else:
    Array = object

_MEMORY = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)
_READABLE, _WRITABLE = 0x100, 0x200


@record(frozen=True, slots=True)
class Tensor:
    """A leaf of the state: its spec, and its memory as a numpy or cupy array.

    `array` shares the leaf's memory and shape; where its library has no such
    element type (bfloat16 in cupy) it holds unsigned integers as wide.
    `owner` keeps the memory alive.
    """

    spec: Spec
    array: Any
    owner: object
    writable: bool

    @property
    def contiguous(self) -> bool:
        """Whether its bytes lie one after the other, in C order."""
        return bool(self.array.flags.c_contiguous)

    @property
    def address(self) -> int:
        """Where element [0, …, 0] lies in its device's memory; 0 if there is none."""
        if not self.spec.nbytes:
            return 0
        array = self.array
        return int(array.ctypes.data if self.spec.device == "cpu" else array.data.ptr)

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes from one element to the next, along each axis."""
        return tuple(self.array.strides)

    @property
    def span(self) -> tuple[int, int]:
        """The addresses of its first byte, and of the byte after its last, in its device."""
        first = self.address
        last = first + self.array.itemsize
        for n, stride in zip(self.spec.shape, self.array.strides, strict=True):
            first += min((n - 1) * stride, 0)
            last += max((n - 1) * stride, 0)
        return first, last

    @property
    def where(self) -> tuple[object, ...]:
        """The same for two leaves exactly if they are one array, and one part of a tensor."""
        if not self.spec.nbytes:
            return ("empty", id(self.owner))
        return (self.address, *self.layout)

    @property
    def layout(self) -> tuple[object, ...]:
        """All of `where` but the address."""
        spec = self.spec
        return (spec.device, self.strides, spec.shape, spec.dtype, spec.offset, spec.whole)


def look(leaf: Any, name: str) -> Tensor | None:
    """See `leaf` as a tensor called `name`; None if it isn't an array at all.

    Nothing is copied and nothing waited for.

    Raises:
        UnsupportedError: it is an array, but not one that can be saved.
    """
    if isinstance(leaf, np.ndarray):
        return _look_numpy(leaf, leaf, name, "numpy")
    if isinstance(leaf, np.generic):
        return None  # a plain value, though it speaks the protocols of arrays
    kind = _kind(leaf)
    if kind in ("torch", "jax"):
        leaf = detached(leaf, name) if kind == "torch" else checked(leaf, name)
    if kind == "cupy":
        return _look_cupy(leaf, leaf, name, writable=True)
    if hasattr(leaf, "__dlpack_device__") and kind != "numba":
        # The device itself looks at torch's streams; of others' it knows nothing.
        seen = dlpack.look(leaf, ordered=kind != "torch")
        if isinstance(seen, dlpack.Memory):
            return _look_memory(seen, name, kind)
        if kind == "torch" or not hasattr(leaf, "__array__"):
            raise UnsupportedError(name, seen)
    if hasattr(leaf, "__cuda_array_interface__"):
        _, read_only = leaf.__cuda_array_interface__["data"]
        return _look_cupy(_of_interface(leaf), leaf, name, writable=not read_only)
    if hasattr(leaf, "__array_interface__") or kind == "jax":
        return _look_numpy(np.asarray(leaf), leaf, name, kind)
    return None


def shard(tensor: Tensor, box: Box, whole: Shape, within: Box | None = None) -> Tensor:
    """The same memory as a part of a tensor of shape `whole`: all of it, or what is `within`."""
    if within is not None:
        spec, array = tensor.spec, tensor.array[within.slices]
        spec = replace(spec, shape=tuple(array.shape), axes=_axes(array))
        tensor = replace(tensor, spec=spec, array=array)
    if box == whole_box(whole):
        return tensor
    return replace(tensor, spec=replace(tensor.spec, offset=box.offset, whole=whole))


def _kind(leaf: object) -> str:
    library = type(leaf).__module__.partition(".")[0]
    return {"cupy": "cupy", "jax": "jax", "jaxlib": "jax", "numba": "numba"}.get(
        library, "torch" if is_torch(leaf) else "numpy"
    )


def checked(leaf: Any, name: str) -> Any:
    """An array of JAX's that has memory to look at; of one that is gone, JAX says no name."""
    if callable(gone := getattr(leaf, "is_deleted", None)) and gone():
        raise UnsupportedError(
            name,
            "its memory was donated to a function, or deleted; save what that function returned, "
            "before it is donated in turn",
        )
    if type(leaf).__name__ == "PRNGKeyArray":
        raise UnsupportedError(
            name, "random keys have no bytes; use gpuckpt.jax, or save jax.random.key_data(key)"
        )
    return leaf


def _look_numpy(array: npt.NDArray[Any], owner: object, name: str, kind: str) -> Tensor:
    if type(array) is np.ndarray and kind == "numpy":  # mostly
        return _tensor(array.view(), owner, name, kind, writable=array.flags.writeable)
    if isinstance(array, np.ma.MaskedArray):
        raise UnsupportedError(name, "a masked array; save its .data and its .mask")
    writable = kind in ("numpy", "numba") and array.flags.writeable
    if isinstance(array, np.memmap):
        owner = owner, _kept_open(array, name)
    return _tensor(array.view(np.ndarray), owner, name, kind, writable=writable)


def _kept_open(array: Any, name: str) -> memoryview | None:
    """A view of a mapped file that keeps it from being closed; numpy's doesn't, and reads on."""
    while isinstance(array, np.ndarray):
        array = array.base
    if not isinstance(array, mmap.mmap):
        return None  # a copy of one
    try:
        return memoryview(array)
    except ValueError:
        raise UnsupportedError(name, "a memmap whose file was closed; open it again") from None


def _of_interface(leaf: Any) -> Any:
    """Its memory in place: on any device but its own, cupy would copy it to the current one."""
    import cupy

    address, _ = leaf.__cuda_array_interface__["data"]
    at = cupy.cuda.runtime.pointerGetAttributes(address).device if address else -1
    with cupy.cuda.Device(at) if at >= 0 else contextlib.nullcontext():
        return cupy.asarray(leaf)


def _look_cupy(array: Any, owner: object, name: str, *, writable: bool) -> Tensor:
    dtype = name_of(np.dtype(array.dtype))
    held = array.dtype if dtype is None else cuda_dtype(dtype, name)
    array = array if held == array.dtype else array.view(held)
    return _tensor(array, owner, name, "cupy", writable=writable, dtype=dtype)


def _look_memory(memory: dlpack.Memory, name: str, kind: str) -> Tensor:
    writable = kind != "jax"
    if memory.device is None:
        array: Any = _on_host(memory)
    else:
        array = _on_cuda(memory, name)
    return _tensor(array, memory.owner, name, kind, writable=writable, dtype=memory.dtype)


def _on_host(memory: dlpack.Memory) -> npt.NDArray[Any]:
    if not math.prod(memory.shape):
        return np.empty(memory.shape, to_numpy(memory.dtype))
    interface = {
        "data": (memory.address, False),
        "shape": memory.shape,
        "strides": memory.strides,
        "typestr": f"|V{memory.itemsize}",
        "version": 3,
    }
    return np.asarray(_Held(interface, memory.owner)).view(to_numpy(memory.dtype))


class _Held:
    """Memory for numpy to look at, which keeps its owner alive as long as numpy keeps it."""

    def __init__(self, interface: dict[str, Any], owner: object) -> None:
        self.__array_interface__ = interface
        self.owner = owner


def _on_cuda(memory: dlpack.Memory, name: str) -> Any:
    import cupy

    dtype = cuda_dtype(memory.dtype, name)
    with cupy.cuda.Device(memory.device):
        if not math.prod(memory.shape):
            return cupy.empty(memory.shape, dtype)
        span = sum((n - 1) * abs(s) for n, s in zip(memory.shape, memory.strides, strict=True))
        owned = cupy.cuda.UnownedMemory(
            memory.address, span + memory.itemsize, memory.owner, memory.device
        )
        pointer = cupy.cuda.MemoryPointer(owned, 0)
        return cupy.ndarray(memory.shape, dtype, pointer, memory.strides)


def host_view(address: int, spec: Spec, strides: tuple[int, ...]) -> npt.NDArray[Any]:
    """See host memory as an array: element [0, …, 0] at `address`, `strides` in bytes.

    It doesn't own the memory, which must outlive it, and may be written to.
    """
    dtype = to_numpy(spec.dtype)
    if not spec.nbytes:
        return np.empty(spec.shape, dtype)
    first = address + sum(min((n - 1) * s, 0) for n, s in zip(spec.shape, strides, strict=True))
    span = sum((n - 1) * abs(s) for n, s in zip(spec.shape, strides, strict=True))
    memory = _MEMORY(first, span + dtype.itemsize, _WRITABLE)
    return np.ndarray(spec.shape, dtype, memory, address - first, strides)


def host_bytes(address: int, nbytes: int, owner: object = None) -> npt.NDArray[np.uint8]:
    """See host memory as bytes, to be read; without an `owner`, it must outlive the array."""
    if not nbytes:
        return np.empty(0, np.uint8)
    if owner is not None:
        place = {"data": (address, True), "shape": (nbytes,), "typestr": "|u1", "version": 3}
        return np.asarray(_Held(place, owner))
    return np.ndarray(nbytes, np.uint8, _MEMORY(address, nbytes, _READABLE))


def host_words(address: int, count: int) -> npt.NDArray[np.uint64]:
    """See `count` words of eight bytes of host memory as an array that doesn't own them."""
    return np.ndarray(count, np.uint64, _MEMORY(address, 8 * count, _READABLE))


def cuda_dtype(dtype_name: str, name: str) -> np.dtype[Any]:
    """The type under which cupy holds the elements of `name`: their own, or integers as wide.

    Raises:
        UnsupportedError: neither exists.
    """
    dtype = to_numpy(dtype_name)
    if dtype.kind in "biufc" and dtype.isbuiltin == 1 and dtype.char not in "gG":
        return dtype
    if dtype.itemsize not in {1, 2, 4, 8}:
        raise UnsupportedError(name, f"a GPU array can't hold {dtype_name}; pass device='cpu'")
    return np.dtype(f"u{dtype.itemsize}")


def _tensor(
    array: Any, owner: object, name: str, kind: str, *, writable: bool, dtype: str | None = None
) -> Tensor:
    dtype = dtype or name_of(np.dtype(array.dtype))
    if dtype is None:
        raise UnsupportedError(name, f"elements of type {array.dtype} can't be saved as bytes")
    device = "cpu" if isinstance(array, np.ndarray) else f"cuda:{array.device.id}"
    if array.flags.c_contiguous:
        return Tensor(
            Spec(name, dtype, tuple(array.shape), None, kind, device), array, owner, writable
        )
    spec = Spec(name, dtype, tuple(array.shape), _axes(array), kind, device)
    # Where an element of memory is there twice, filling it in place would keep the last of two.
    pairs = zip(array.shape, array.strides, strict=True)
    twice = bool(array.size) and any(n > 1 and not stride for n, stride in pairs)
    return Tensor(spec, array, owner, writable and not twice)


def _axes(array: Any) -> tuple[int, ...] | None:
    """The order of axes in memory, if the array is dense but not in C order."""
    if array.flags.c_contiguous or array.ndim < 2 or not array.size:
        return None
    axes = tuple(sorted(range(array.ndim), key=lambda axis: -array.strides[axis]))
    return axes if array.transpose(axes).flags.c_contiguous else None
