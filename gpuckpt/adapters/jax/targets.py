"""Where arrays of JAX's are wanted, and how they get there from what a restore has filled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from gpuckpt.adapters.jax.leaves import is_key, is_weak, weakened
from gpuckpt.arrays import Filled, Hollow, finish
from gpuckpt.boxes import Box, Shape, whole_box
from gpuckpt.dtypes import name_of
from gpuckpt.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Target:
    """An array that is wanted like `leaf`, which may stand for one, and may be deleted.

    `shape` and `dtype` are those of the elements that are stored.  `sharding`
    is None where JAX is to say where the array belongs.
    """

    leaf: Any
    name: str
    shape: Shape
    dtype: str
    sharding: Any

    @classmethod
    def of(cls, leaf: Any, name: str) -> Target:
        """What is known of a leaf.

        Raises:
            UnsupportedError: it has elements that aren't known here, or a
                sharding without devices.
        """
        stored = jax.eval_shape(jax.random.key_data, _abstract(leaf)) if is_key(leaf) else leaf
        dtype = name_of(np.dtype(stored.dtype))
        if dtype is None:
            raise UnsupportedError(name, f"elements of type {stored.dtype} aren't known here")
        sharding = _sharding(leaf, name)
        return cls(leaf, name, tuple(map(int, stored.shape)), dtype, sharding)

    def hollow(self) -> Hollow:
        """What a restore is to fill: on each device, or the host, what this process needs."""
        if self.sharding is None or is_key(self.leaf):
            device = "cpu" if is_key(self.leaf) else _place(_default_device(), None, self.dtype)
            return Hollow(self.dtype, self.shape, ((whole_box(self.shape), device),))
        places: dict[Box, str] = {}
        for device, box in self._boxes():
            places.setdefault(box, _place(device, self.sharding.memory_kind, self.dtype))
        if not places:  # it lies on other processes alone
            nothing = (0, *self.shape[1:])
            places[Box((0,) * len(nothing), nothing)] = "cpu"
        return Hollow(self.dtype, self.shape, tuple(places.items()))

    def array(self, filled: Filled) -> Any:
        """The array, of what a restore has filled."""
        made = {box: _finished(tensor) for box, tensor in filled.made.items()}
        if is_key(self.leaf):
            return self._keys(made[whole_box(self.shape)])
        if self.sharding is None:
            return jax.device_put(made[whole_box(self.shape)])
        kind, single = self.sharding.memory_kind, jax.sharding.SingleDeviceSharding
        arrays = [
            jax.device_put(made[box], single(device, memory_kind=kind))
            for device, box in self._boxes()
        ]
        return jax.make_array_from_single_device_arrays(
            self.shape, self.sharding, arrays, dtype=self.leaf.dtype
        )

    def _keys(self, data: Any) -> Any:
        impl: list[Any] = []
        jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), _abstract(self.leaf))
        keys = jax.random.wrap_key_data(jax.device_put(data), impl=impl[0])
        return keys if self.sharding is None else jax.device_put(keys, self.sharding)

    def _boxes(self) -> Iterator[tuple[Any, Box]]:
        """The devices of this process that are to have some of it, each with its box."""
        for device, index in self.sharding.addressable_devices_indices_map(self.shape).items():
            ends = [one.indices(n)[:2] for one, n in zip(index, self.shape, strict=True)]
            shape = tuple(last - first for first, last in ends)
            yield device, Box(tuple(first for first, _ in ends), shape)


def like(array: Any, *, weak: bool) -> Any:
    """The same array, weakly typed or not."""
    return weakened(array) if weak and not is_weak(array) else array


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _sharding(leaf: Any, name: str) -> Any:
    """Where an array is to be; None if nobody has said so, and JAX may choose."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or getattr(leaf, "committed", True) is False:
        return None
    if not hasattr(sharding, "addressable_devices_indices_map"):
        raise UnsupportedError(
            name, f"its sharding is a {type(sharding).__name__}; give a jax.sharding.Sharding"
        )
    return sharding


def _default_device() -> Any:
    """Where JAX puts new arrays of this process."""
    chosen = jax.config.jax_default_device
    if chosen is None or isinstance(chosen, str):
        return jax.local_devices(backend=chosen)[0]
    return chosen


def _place(device: Any, memory_kind: str | None, dtype: str) -> str:
    """The device, by gpuckpt's name, that what is wanted on one of JAX's is restored to first."""
    in_its_memory = memory_kind in (None, "device")
    if device.platform not in ("gpu", "cuda") or not in_its_memory or not _has_cupy():
        return "cpu"
    if dtype.startswith(("int2", "int4", "uint2", "uint4", "float4", "float6")):
        return "cpu"  # JAX has several of these in a byte
    return f"cuda:{device.local_hardware_id}"


def _has_cupy() -> bool:
    try:
        import cupy  # noqa: F401
    except ImportError:
        return False
    return True


def _finished(tensor: Any) -> Any:
    """As JAX takes it without another copy: host memory as numpy's."""
    return finish(tensor, "numpy" if isinstance(tensor.array, np.ndarray) else "jax")
