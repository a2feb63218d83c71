"""A small library of tensors over numpy, as torch's are: with storages, and views that lie.

It has what gpuckpt asks of torch, under torch's names, for tests on machines without it.
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class DType:
    """An element type: one object for each, compared by identity."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.is_complex, self._name = dtype.kind == "c", dtype.name

    def __str__(self) -> str:
        return f"torch.{self._name}"


class Storage:
    """Memory, whichever tensors lie in it."""

    def __init__(self, array: Array) -> None:
        self.array = array


class Tensor:
    """A tensor, whose `data` may be set to another's at any time."""

    __module__ = "torch"
    layout, is_nested, is_quantized, is_meta = "torch.strided", False, False, False
    _dtypes: dict[Any, DType] = {}  # noqa: RUF012 - torch has one object for each, too

    def __init__(self, array: Array) -> None:
        self._array = array
        self.device, self.conjugate, self.negative = "cpu", False, False

    @property
    def data(self) -> Tensor:
        """Itself, without a history."""
        return Tensor(self._array)

    @data.setter
    def data(self, other: Tensor) -> None:
        self._array = other.numpy()

    @property
    def dtype(self) -> DType:
        return self._dtypes.setdefault(self._array.dtype, DType(self._array.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._array.shape)

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self._array.itemsize for step in self._array.strides)

    def data_ptr(self) -> int:
        return self._array.ctypes.data if self._array.size else 0

    def untyped_storage(self) -> Storage:
        return Storage(self._array)

    def is_neg(self) -> bool:
        return self.negative

    def is_conj(self) -> bool:
        return self.conjugate

    def numpy(self) -> Array:
        return self._array

    def detach(self) -> Tensor:
        other = Tensor(self._array)
        other.device, other.conjugate = self.device, self.conjugate
        return other

    def __dlpack_device__(self) -> tuple[int, int]:
        if self.device != "cpu":
            raise ValueError(f"Unknown device type {self.device} for Dlpack")
        return self._array.__dlpack_device__()

    def __dlpack__(self) -> Any:
        if self.conjugate:
            raise BufferError("a conjugated view")
        return self._array.__dlpack__()


class DLPackOnly:
    """A tensor of yet another library, which speaks nothing but DLPack."""

    def __init__(self, array: Array) -> None:
        self._array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()

    def __dlpack__(self) -> Any:
        return self._array.__dlpack__()


class Parameter(Tensor):
    """A tensor that is learnt."""

    __module__ = "torch.nn.parameter"


def module() -> types.ModuleType:
    """The library as a module."""
    module: Any = types.ModuleType("torch")
    module.Tensor, module.nn = Tensor, types.SimpleNamespace(Parameter=Parameter)
    found: types.ModuleType = module
    return found
