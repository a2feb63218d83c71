"""Training states of several processes, saved on one mesh and restored on another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import gpuckpt
from gpuckpt.groups import Group

# What torch's ranks import, once, before they are forked; optimizers import the last.
BEFORE_FORKS = (
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch._dynamo",
)


def saves(group: Group, arguments: dict[str, Any]) -> dict[str, Any]:
    """Trains on a mesh, saves twice, and tells what every tensor was."""
    state = _state(arguments["mesh"], group, seed=0)
    train = state.pop("train")
    with gpuckpt.Checkpointer(arguments["root"], group=group, group_timeout=50) as ckpt:
        ckpt.save(1, state)
        train()
        ckpt.save(2, state).result(50)
    return {"digests": _digests(state), "position": state["position"].value}


def resumes(group: Group, arguments: dict[str, Any]) -> dict[str, Any]:
    """Resumes on another mesh, in a state of other values, and tells what every tensor is."""
    state = _state(arguments["mesh"], group, seed=1)
    state.pop("train")
    with gpuckpt.Checkpointer(arguments["root"], group=group, group_timeout=50) as ckpt:
        step = ckpt.resume(state)
    return {"step": step, "digests": _digests(state), "position": state["position"].value}


def goes_on_with_its_own_disk(group: Group, arguments: dict[str, Any]) -> dict[str, Any]:
    """Resumes from the disk of its own machine, saves thrice, and is cut off."""
    os.environ["GPUCKPT_ADDRESS"] = "127.0.0.1"
    root = Path(arguments["disks"]) / str(group.rank) / "root"
    held = len(list(root.glob("*.segment")))
    table = np.zeros((999, 40), np.float32)
    first, last = (len(table) * at // group.size for at in (group.rank, group.rank + 1))
    rows = gpuckpt.Sharded(table[first:last], shape=table.shape, offset=(first, 0))
    state: dict[str, Any] = {
        "table": rows,
        "w": np.zeros(70_000),
        "own": gpuckpt.PerRank({"rank": group.rank}),
    }
    keep = gpuckpt.Keep(last=2)
    ckpt = gpuckpt.Checkpointer(root, group=group, group_timeout=30, replicas=1, keep=keep)
    done = ckpt.resume(state)
    wrong = int((rows.array != done).sum() + (state["w"] != -done).sum())
    for step in range(done + 1, done + 4):
        rows.array[:], state["w"][:] = step, -step
        ckpt.save(step, state).result(30)
    ckpt.wait()
    kept = ckpt.replicated(30)
    group.barrier(what="all is kept", timeout=30)
    return {"held": held, "step": done, "wrong": wrong, "kept": kept, "own": state["own"].value}


def _state(mesh: str, group: Group, seed: int) -> dict[str, Any]:
    make = _numpy_state if mesh == "numpy" else _jax_state if mesh == "jax" else _torch_state
    state = make(mesh, group, seed)
    state["position"] = gpuckpt.PerRank({"sample": 100 * group.rank + seed})
    state.setdefault("train", lambda: None)
    return state


def _torch_state(mesh: str, group: Group, seed: int) -> dict[str, Any]:
    import torch
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(61, 96), nn.ReLU(), nn.Linear(96, 37), nn.LayerNorm(37))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if mesh == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (group.size,)))
    elif mesh == "hsdp":
        sizes = (2, group.size // 2)
        fully_shard(model, mesh=init_device_mesh("cpu", sizes, mesh_dim_names=("r", "s")))
    elif mesh == "tp":
        parallelize_module(model, init_device_mesh("cpu", (group.size,)), plan)
    elif mesh == "2d":
        both = init_device_mesh("cpu", (2, group.size // 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, both["tp"], plan)
        fully_shard(model, mesh=both["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

    def train() -> None:
        torch.manual_seed(seed + 7)
        model(torch.randn(4, 61)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    train()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "train": train}


def _jax_state(mesh: str, group: Group, seed: int) -> dict[str, Any]:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    devices = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    random = np.random.default_rng(seed)

    def put(values: Any, *axes: str | None) -> Any:
        sharding = NamedSharding(devices, PartitionSpec(*axes))
        return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)

    return {
        "w": put(random.standard_normal((48, 20), np.float32), "x"),
        "columns": put(random.standard_normal((20, 96), np.float32), None, "x"),
        "b": put(random.standard_normal(5000, np.float32)),
        "count": np.array(seed),
    }


def _numpy_state(mesh: str, group: Group, seed: int) -> dict[str, Any]:
    """A table sharded by rows, unevenly, beside a model that all hold."""
    random = np.random.default_rng(seed)
    table = random.standard_normal((1003, 24), np.float32)
    edges = [1003 * rank * rank // group.size**2 for rank in range(group.size + 1)]
    first, last = edges[group.rank : group.rank + 2]
    rows = gpuckpt.Sharded(table[first:last].copy(), shape=table.shape, offset=(first, 0))
    return {"table": rows, "model": {"w": random.standard_normal((300, 70))}, "step": 12}


def _digests(state: dict[str, Any]) -> dict[str, str]:
    """Of every tensor as a whole, if this rank can see it, or of this rank's box of it."""
    found: dict[str, str] = {}
    _digest_into(state, "", found)
    return found


def _digest_into(node: Any, name: str, found: dict[str, str]) -> None:
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in items:
            _digest_into(child, f"{name}.{key}", found)
    elif isinstance(node, gpuckpt.Sharded):
        _note(node.array, node.offset, name, found)
    elif hasattr(node, "addressable_shards"):
        for shard in node.addressable_shards:
            _note(np.asarray(shard.data), [part.start or 0 for part in shard.index], name, found)
    elif hasattr(node, "detach"):
        whole = node.full_tensor() if hasattr(node, "full_tensor") else node
        found[name] = _sha(whole.detach().numpy())
    elif isinstance(node, np.ndarray):
        found[name] = _sha(node)


def _note(values: Any, offset: Sequence[int], name: str, found: dict[str, str]) -> None:
    """Each element of a box, under its place in the whole tensor."""
    for index in np.ndindex(values.shape):
        place = [at + begin for at, begin in zip(index, offset, strict=True)]
        found[f"{name}.{place}"] = values[index].tobytes().hex()


def _sha(values: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
