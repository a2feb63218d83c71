"""One process with eight of JAX's devices on the host: what it has of sharded arrays."""

from __future__ import annotations

import itertools
import sys
import tempfile
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import gpuckpt
from gpuckpt.arrays import Tensor, assembled, look, look_all, make
from gpuckpt.boxes import gap, whole_box
from gpuckpt.census import Census
from gpuckpt.commit import open_step
from gpuckpt.devices import Devices
from gpuckpt.stores.local import LocalStore
from tests.ranks.outcomes import tell

SHAPES = [(8, 16), (16, 8, 3), (24,), (8, 0), (0, 8)]


def meshes() -> list[Mesh]:
    devices = np.array(jax.devices())
    return [Mesh(devices, "x"), Mesh(devices.reshape(4, 2), ("x", "y")), Mesh(devices[:2], "x")]


def of_shape(shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray[Any, Any]:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def placed() -> list[tuple[np.ndarray[Any, Any], Any]]:
    """Arrays in full, and as JAX has them in every way that a mesh allows."""
    found = []
    for mesh, shape in itertools.product(meshes(), SHAPES):
        names: list[Any] = [None, *mesh.axis_names]
        if len(mesh.axis_names) > 1:
            names.append(tuple(mesh.axis_names))
        for spec in itertools.product(names, repeat=len(shape)):
            flat = [one for name in spec if name for one in (name,) * isinstance(name, str) or name]
            if len(flat) > len(set(flat)):
                continue
            try:
                sharding = NamedSharding(mesh, PartitionSpec(*spec))
                full = of_shape(shape)
                found.append((full, jax.device_put(full, sharding)))
            except ValueError:
                continue  # an axis that the mesh doesn't divide
    assert len(found) > 30
    return found


def shards() -> None:
    for full, leaf in placed():
        found = look_all(leaf, "w")
        assert len({tensor.spec.label for tensor in found}) == len(found)
        for tensor in found:
            spec = tensor.spec
            assert (spec.dtype, spec.kind, spec.full_shape) == ("float32", "jax", full.shape)
            assert np.array_equal(tensor.array, full[spec.box.slices])
            assert not tensor.writable
        boxes = [tensor.spec.box for tensor in found]
        assert gap(boxes, whole_box(full.shape)) is None
        assert sum(box.count for box in boxes) == full.size, "what is replicated is there once"


def nothing_is_gathered() -> None:
    for _, leaf in placed():
        pointers = {one.data.unsafe_buffer_pointer() for one in leaf.addressable_shards}
        for tensor in look_all(leaf, "w"):
            assert not tensor.spec.nbytes or tensor.address in pointers


def copies_everywhere_are_one_plain_array() -> None:
    for mesh in meshes():
        full = of_shape((8, 3))
        leaf = jax.device_put(full, NamedSharding(mesh, PartitionSpec()))
        tensor = look(leaf, "w")
        assert tensor is not None
        assert tensor.spec.offset is None
        assert np.array_equal(tensor.array, full)


def made_anew() -> None:
    devices = Devices()
    for full, leaf in placed():
        filled: list[Tensor] = []
        for tensor in look_all(leaf, "w"):
            new = make(tensor.spec, devices["cpu"])
            new.array[...] = full[tensor.spec.box.slices] + 1
            filled.append(new)
        again = assembled(leaf, filled, "jax")
        assert again.sharding == leaf.sharding
        assert again.dtype == leaf.dtype
        assert np.array_equal(again, full + 1)


def a_census() -> None:
    mesh = meshes()[1]
    leaf = jax.device_put(of_shape((8, 16)), NamedSharding(mesh, PartitionSpec("x", "y")))
    other = jax.device_put(of_shape((8, 16)), NamedSharding(mesh, PartitionSpec("x")))
    one = jax.numpy.ones(3)
    census = Census()
    state: dict[str, Any] = {"w": leaf, "again": leaf, "b": one, "lr": 0.1}
    first = census.take(state)
    assert len(first.specs) == 8 + 1
    state["lr"] = 0.2
    assert census.take(state).roster is first.roster
    state["w"] = state["again"] = leaf + 1
    assert census.take(state).roster is first.roster
    state["again"] = leaf
    assert len(census.take(state).specs) == 16 + 1
    state["w"] = state["again"] = other
    assert len(census.take(state).specs) == 4 + 1


def a_save() -> None:
    mesh, full = meshes()[1], of_shape((8, 16))
    leaf = jax.device_put(full, NamedSharding(mesh, PartitionSpec("y", "x")))
    with tempfile.TemporaryDirectory() as folder:
        gpuckpt.save(folder, {"w": leaf, "b": jax.numpy.ones(3)})
        rows = open_step(LocalStore(folder)).tensors
    assert [row.spec.name for row in rows] == ["w"] * 8 + ["b"]
    assert gap([row.spec.box for row in rows[:8]], whole_box((8, 16))) is None


CHECKS = {
    check.__name__: check
    for check in (
        *(shards, nothing_is_gathered, copies_everywhere_are_one_plain_array, made_anew),
        *(a_census, a_save),
    )
}

if __name__ == "__main__":
    tell(CHECKS, f"{sys.argv[1]}/{sys.argv[2]}")
