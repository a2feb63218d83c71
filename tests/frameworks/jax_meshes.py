"""One process with eight of JAX's devices on the host: trees saved on one mesh, and on others."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import gpuckpt
import gpuckpt.jax
from gpuckpt.stores.memory import MemoryStore
from tests.frameworks.trees import bits_of
from tests.ranks.outcomes import tell

DEVICES = np.array(jax.devices())
FULL = np.random.default_rng(3).integers(0, 1 << 16, (16, 24), np.uint16).view("bfloat16")


def shardings() -> list[Any]:
    meshes = [
        Mesh(DEVICES, "x"),
        Mesh(DEVICES.reshape(4, 2), ("x", "y")),
        Mesh(DEVICES[::-1][:2], "x"),
    ]
    found: list[Any] = [SingleDeviceSharding(DEVICES[5])]
    for mesh in meshes:
        names = (None, *mesh.axis_names)
        for spec in itertools.product(names, repeat=2):
            if spec[0] is None or spec[0] != spec[1]:
                found.append(NamedSharding(mesh, PartitionSpec(*spec)))
    return found


def saved(tree: Any) -> MemoryStore:
    store = MemoryStore()
    with gpuckpt.jax.Checkpointer("", store=store) as ckpt:
        ckpt.save(1, tree)
    return store


def check(found: Any, sharding: Any) -> None:
    assert found.sharding == sharding, (found.sharding, sharding)
    assert bits_of(found) == FULL.tobytes()
    for shard in found.addressable_shards:
        assert bits_of(shard.data) == FULL[shard.index].tobytes()


def another_mesh() -> None:
    every = shardings()
    for one in every:
        store = saved({"w": jax.device_put(FULL, one)})
        target = {str(at): jax.device_put(np.zeros_like(FULL), to) for at, to in enumerate(every)}
        for leaf, to in zip(target.values(), every, strict=True):
            check(gpuckpt.jax.load("", {"w": leaf}, store=store)["w"], to)


def abstract_targets() -> None:
    store = saved({"w": jax.device_put(FULL, shardings()[3])})
    for to in shardings():
        leaf = jax.ShapeDtypeStruct(FULL.shape, FULL.dtype, sharding=to)
        check(gpuckpt.jax.load("", {"w": leaf}, store=store)["w"], to)


def keys_on_a_mesh() -> None:
    sharding = NamedSharding(Mesh(DEVICES, "x"), PartitionSpec("x"))
    keys = jax.device_put(jax.random.split(jax.random.key(3), 16), sharding)
    found = gpuckpt.jax.load("", {"k": keys}, store=saved({"k": keys}))["k"]
    assert found.sharding == sharding
    assert bits_of(found) == bits_of(keys)


def one_device_stays_one() -> None:
    """An array that nobody has put anywhere goes with those on any mesh; a committed one stays."""
    free, bound = jax.device_put(FULL), jax.device_put(FULL, DEVICES[3])
    tree = {"free": free, "bound": bound}
    found = gpuckpt.jax.load("", tree, store=saved(tree))
    assert not found["free"].committed
    assert found["bound"].committed
    assert found["bound"].devices() == {DEVICES[3]}


def functions() -> None:
    """On a checkpointer that somebody has already."""
    sharding = shardings()[2]
    tree = {"w": jax.device_put(FULL, sharding)}
    with gpuckpt.Checkpointer("", store=MemoryStore()) as ckpt:
        assert gpuckpt.jax.resume(ckpt, tree) == (0, tree)
        assert gpuckpt.jax.step(ckpt, 1, tree) is None
        gpuckpt.jax.save(ckpt, 2, tree)
        check(gpuckpt.jax.restore(ckpt, tree)["w"], sharding)
        step, found = gpuckpt.jax.resume(ckpt, tree)
        assert step == 2
        check(found["w"], sharding)


def one_that_is_gone_is_named() -> None:
    leaf = jax.device_put(FULL, shardings()[2])
    leaf.delete()
    with pytest.raises(gpuckpt.UnsupportedError, match=r"deep\.w"):
        saved({"deep": {"w": leaf}})


CHECKS = {
    one.__name__: one
    for one in (
        another_mesh,
        abstract_targets,
        keys_on_a_mesh,
        one_device_stays_one,
        functions,
        one_that_is_gone_is_named,
    )
}

if __name__ == "__main__":
    tell(CHECKS, f"{sys.argv[1]}/{sys.argv[2]}")
