"""Make new arrays of the library that the user asks for: the other way of `look`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from gpuckpt.arrays.view import Tensor, cuda_dtype
from gpuckpt.dtypes import to_numpy
from gpuckpt.errors import InvalidError, NotFoundError, UnsupportedError
from gpuckpt.spec import Spec

KINDS = ("numpy", "cupy", "torch", "jax")


class Allocator(Protocol):
    """As much of a `Device` as it takes to make an array on it."""

    @property
    def name(self) -> str:
        """`cpu`, `cuda:0`, …."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """An uninitialised array in C order."""
        ...


def make(spec: Spec, device: Allocator) -> Tensor:
    """A new, uninitialised tensor on `device`, its axes in memory as saved.

    Raises:
        DeviceMemoryError: the device has no room.
        UnsupportedError: its arrays can't hold such elements.
    """
    order = spec.axes or tuple(range(len(spec.shape)))
    shape = tuple(spec.shape[axis] for axis in order)
    on_host = device.name == "cpu"
    dtype = to_numpy(spec.dtype) if on_host else cuda_dtype(spec.dtype, spec.name)
    try:
        array = device.empty(shape, dtype)
    except ValueError as error:  # its libraries allow fewer axes than the format
        raise UnsupportedError(spec.name, f"can't be made on {device.name}: {error}") from error
    array = array.transpose(tuple(np.argsort(order))) if order else array
    return Tensor(replace(spec, device=device.name), array, array, writable=True)


def finish(tensor: Tensor, kind: str) -> Any:
    """Hand a tensor that `make` made, and that has been filled, to the library `kind`.

    Copies nothing, but for jax, whose arrays own their memory.
    """
    on_host = isinstance(tensor.array, np.ndarray)
    if kind == "torch":
        return _to_torch(tensor)
    if kind == "jax":
        return _to_jax(tensor)
    if kind not in KINDS:
        raise InvalidError(f"like is one of {', '.join(KINDS)}; got {kind!r}")
    if kind == "cupy" and on_host:
        raise InvalidError(f"{tensor.spec.name}: like='cupy' needs device='cuda'")
    return tensor.array if on_host else _to_cupy(tensor)


def _to_cupy(tensor: Tensor) -> Any:
    """The element type that was saved, where this cupy has it (bfloat16 since version 14)."""
    import cupy

    wanted = to_numpy(tensor.spec.dtype)
    try:
        cupy.empty(0, wanted)
    except (TypeError, ValueError):
        return tensor.array
    return tensor.array.view(wanted)


def _to_torch(tensor: Tensor) -> Any:
    with _needs("torch", tensor):
        import torch
    name = tensor.spec.dtype
    dtype = getattr(torch, name, None)
    if dtype is None or tensor.array.dtype.byteorder == ">":
        raise InvalidError(f"{tensor.spec.name}: torch has no {name}; pass like='numpy'")
    if tensor.array.dtype.kind not in "biufc" or to_numpy(name).isbuiltin != 1:
        array = tensor.array.view(f"i{tensor.array.dtype.itemsize}")
        return torch.from_dlpack(array).view(dtype)
    return torch.from_dlpack(tensor.array)


def _to_jax(tensor: Tensor) -> Any:
    with _needs("jax", tensor):
        import jax
    wanted = to_numpy(tensor.spec.dtype)
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        raise InvalidError(
            f"{tensor.spec.name}: jax would narrow {tensor.spec.dtype}; "
            "set jax_enable_x64, or pass like='numpy'"
        )
    if isinstance(tensor.array, np.ndarray):
        return jax.numpy.array(tensor.array)
    array = jax.dlpack.from_dlpack(tensor.array)
    return array if array.dtype == wanted else jax.lax.bitcast_convert_type(array, wanted)


@contextlib.contextmanager
def _needs(name: str, tensor: Tensor) -> Iterator[None]:
    """Import a library in here: what says so if it isn't installed."""
    try:
        yield
    except ImportError as error:
        raise NotFoundError(
            f"{tensor.spec.name} was saved from {name}, which isn't installed here; "
            "install it, or pass like='numpy'"
        ) from error
