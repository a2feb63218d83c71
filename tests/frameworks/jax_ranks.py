"""One of several processes of JAX's, each with some devices: trees over all of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import jax

FOLDER, RANK, SIZE = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
jax.distributed.initialize(os.environ["JAX_RANKS_ADDRESS"], SIZE, RANK)

import numpy as np  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

import gpuckpt.adapters.orbax as ocp  # noqa: E402
import gpuckpt.jax  # noqa: E402
from tests.ranks.outcomes import tell  # noqa: E402

FULL = np.random.default_rng(3).integers(0, 1 << 16, (16, 24), np.uint16).view("bfloat16")
DEVICES = np.array(jax.devices())


def placed(full: Any, sharding: Any) -> Any:
    return jax.make_array_from_callback(full.shape, sharding, lambda index: full[index])


def shardings() -> list[Any]:
    one, two = Mesh(DEVICES, "x"), Mesh(DEVICES.reshape(-1, 2), ("x", "y"))
    parts = PartitionSpec
    return [
        *(NamedSharding(one, parts("x")), NamedSharding(one, parts(None, "x"))),
        *(NamedSharding(two, parts("y", "x")), NamedSharding(two, parts("x"))),
        *(NamedSharding(one, parts()), NamedSharding(Mesh(DEVICES[::-1], "x"), parts("x"))),
    ]


def check(found: Any, sharding: Any) -> None:
    assert found.sharding == sharding
    for shard in found.addressable_shards:
        assert np.asarray(shard.data).tobytes() == FULL[shard.index].tobytes()


def other_meshes() -> None:
    every = shardings()
    tree = {"w": placed(FULL, every[0]), "key": jax.random.key(3), "step": 7}
    with gpuckpt.jax.Checkpointer(FOLDER / "run", every=gpuckpt.Every(steps=1)) as ckpt:
        assert ckpt.resume(tree)[0] == 0
        ckpt.step(1, tree)
        for sharding in every:
            shape = jax.ShapeDtypeStruct(FULL.shape, FULL.dtype, sharding=sharding)
            step, found = ckpt.resume({**tree, "w": shape})
            assert (step, found["step"]) == (1, 7)
            check(found["w"], sharding)
            assert (jax.random.key_data(found["key"]) == jax.random.key_data(tree["key"])).all()
    multihost_utils.sync_global_devices("one")


def a_manager() -> None:
    every = shardings()
    with ocp.CheckpointManager(FOLDER / "orbax") as manager:
        manager.save(1, args=ocp.args.StandardSave({"w": placed(FULL, every[2])}))
        for sharding in every:
            shape = jax.ShapeDtypeStruct(FULL.shape, FULL.dtype, sharding=sharding)
            target = ocp.args.StandardRestore({"w": shape})
            check(manager.restore(1, args=target)["w"], sharding)
    multihost_utils.sync_global_devices("two")


CHECKS = {one.__name__: one for one in (other_meshes, a_manager)}

if __name__ == "__main__":
    tell(CHECKS, f"{FOLDER}/{RANK}")
