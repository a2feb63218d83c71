"""What ranks of torch do in tests/ranks/test_dcp.py: real models, saved and loaded by DCP."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which optimizers import: once, before the ranks are forked
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import gpuckpt
from gpuckpt.adapters.dcp import StorageReader, StorageWriter


class Model(nn.Module):  # type: ignore[misc]
    """Three layers, of sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(19, 37)
        self.down = nn.Linear(37, 19, bias=False)
        self.norm = nn.LayerNorm(19)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))

    def forward(self, x: Any) -> Any:
        return self.norm(self.down(torch.relu(self.up(x))))


def trained(way: str, size: int, seed: int, *, steps: int = 2) -> tuple[Any, Any]:
    """A model, sharded in some way, and its optimizer, after some steps."""
    torch.manual_seed(seed)
    model = Model()
    if way in ("tp", "2d"):
        tp = size if way == "tp" else 2
        mesh = init_device_mesh("cpu", (size // tp, tp), mesh_dim_names=("dp", "tp"))
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        if way == "2d":
            fully_shard(model, mesh=mesh["dp"])
    elif way == "fsdp":
        fully_shard(model.up)
        fully_shard(model)
    elif way == "hsdp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("copies", "shards"))
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 + seed, foreach=False)
    for step in range(steps):
        for at, parameter in enumerate(model.parameters()):
            parameter.grad = torch.sin(parameter.detach() * (at + step + 1))
        optimizer.step()
        optimizer.zero_grad()
        model.seen += seed + 1
    return model, optimizer


def state_of(model: Any, optimizer: Any) -> dict[str, Any]:
    """As torchtitan has it: what is sharded, and plain values beside it."""
    states, optimizers = get_state_dict(model, optimizer)
    return {"model": states, "optimizer": optimizers, "step": 0, "history": [0.0]}


def digests(state: Any, path: str = "") -> dict[str, str]:
    """Of each tensor in full, and of each value."""
    if isinstance(state, dict):
        return {k: v for key in state for k, v in digests(state[key], f"{path}.{key}").items()}
    if isinstance(state, list) and any(isinstance(one, dict) for one in state):
        return {
            k: v for at, one in enumerate(state) for k, v in digests(one, f"{path}.{at}").items()
        }
    if isinstance(state, DTensor):
        state = state.full_tensor()
    if isinstance(state, torch.Tensor):
        data = state.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        head = f"{state.dtype} {tuple(state.shape)}"
        return {path: f"{head} {hashlib.sha256(data).hexdigest()}"}
    return {path: repr(state)}


def saves(group: gpuckpt.Group, arguments: dict[str, Any]) -> dict[str, str]:
    model, optimizer = trained(arguments["way"], group.size, 1)
    state = state_of(model, optimizer) | {"step": 300, "history": [0.5, 0.25]}
    dcp.save(state, storage_writer=StorageWriter(arguments["place"], codec="zstd"))
    return digests(state)


def loads(group: gpuckpt.Group, arguments: dict[str, Any]) -> list[dict[str, str]]:
    """What a model has before and after it is loaded into."""
    model, optimizer = trained(arguments["way"], group.size, 2)
    state = state_of(model, optimizer)
    before = digests(state)
    dcp.load(state, storage_reader=StorageReader(arguments["place"]))
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    after = state_of(model, optimizer) | {name: state[name] for name in ("step", "history")}
    return [before, digests(after)]


def matrix(size: int, seed: int, *, rows: int = 23) -> torch.Tensor:
    return torch.randn(rows, 13, generator=torch.Generator().manual_seed(seed))


def placed(size: int, way: str, seed: int) -> dict[str, Any]:
    """DTensors of more kinds than models have: uneven, with empty shards, replicated."""
    mesh = init_device_mesh("cpu", (size,))
    axis = int(way == "columns")
    plane = init_device_mesh("cpu", (2, size // 2))
    each = [Shard(0), Shard(1)] if way == "columns" else [Shard(1), Replicate()]
    return {
        "uneven": distribute_tensor(matrix(size, seed), mesh, [Shard(axis)]),
        "few": distribute_tensor(matrix(size, seed, rows=2), mesh, [Shard(0)]),
        "copies": distribute_tensor(matrix(size, seed), mesh, [Replicate()]),
        "plane": distribute_tensor(matrix(size, seed).bfloat16(), plane, each),
        "same": matrix(size, seed),
    }


def saves_placed(group: gpuckpt.Group, arguments: dict[str, Any]) -> dict[str, str]:
    """By DCP, or by a checkpointer."""
    state = placed(group.size, arguments["way"], 1)
    if arguments["by"] == "dcp":
        dcp.save(state, storage_writer=StorageWriter(arguments["place"]))
    else:
        with gpuckpt.Checkpointer(arguments["place"], group=group) as checkpointer:
            checkpointer.save(7, state).result(60)
    return digests(state)


def loads_placed(group: gpuckpt.Group, arguments: dict[str, Any]) -> dict[str, str]:
    state = placed(group.size, arguments["way"], 2)
    dcp.load(state, storage_reader=StorageReader(arguments["place"]))
    return digests(state)


class _Dying(StorageWriter):
    """A writer whose process is killed once its part is durable, or fails before."""

    how = ""

    def write_data(self, plan: Any, planner: Any) -> Any:
        if self.how == "fail":
            raise gpuckpt.StorageError("the disk is full")
        done = super().write_data(plan, planner)
        if self.how == "die":
            os._exit(9)
        return done


def loses(group: gpuckpt.Group, arguments: dict[str, Any]) -> str:
    """Save while rank 1 fails or dies: what the others hear."""
    writer = _Dying(arguments["place"])
    writer.how = arguments["how"] if group.rank == 1 else ""
    try:
        dcp.save(placed(group.size, "rows", 2), storage_writer=writer)
    except (CheckpointException, RuntimeError) as error:
        return str(error)
    return "saved"


def saves_alone(group: gpuckpt.Group, arguments: dict[str, Any]) -> list[dict[str, str]]:
    """Without collectives each rank has a checkpoint of its own, under one path."""
    place = arguments["place"]
    state = {"own": matrix(0, group.rank), "step": group.rank}
    dcp.save(state, storage_writer=StorageWriter(place), use_collectives=False)
    other = {"own": torch.zeros(23, 13), "step": -1}
    dcp.load(other, storage_reader=StorageReader(place))
    return [digests(state), digests(other)]


def saves_asynchronously(group: gpuckpt.Group, arguments: dict[str, Any]) -> list[dict[str, str]]:
    """In a thread, and in another process, while the state goes on."""
    found = []
    for name in ("THREAD", "PROCESS"):
        place = Path(arguments["place"], name)
        state = placed(group.size, "rows", 1)
        found.append(digests(state))
        how = AsyncCheckpointerType[name]
        options = {"storage_writer": StorageWriter(place), "async_checkpointer_type": how}
        pending = dcp.async_save(state, **options)
        for tensor in state.values():
            tensor.zero_()
        pending.result()
        dcp.load(state, storage_reader=StorageReader(place))
        found.append(digests(state))
    return found
