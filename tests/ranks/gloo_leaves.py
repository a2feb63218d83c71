"""One of four gloo ranks: what it has of torch's sharded tensors, against the tensors in full."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard as Piece
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

import gpuckpt
from gpuckpt.arrays import Tensor, look, look_all
from gpuckpt.boxes import Box, gap
from gpuckpt.census import Census
from gpuckpt.errors import UnsupportedError
from gpuckpt.spec import Spec
from tests.ranks.outcomes import tell


def agree(leaf: Any, name: str = "w", *, full: torch.Tensor | None = None) -> tuple[Tensor, ...]:
    """See that this rank's shards are those of the full tensor, and all ranks' together all of it.

    `full` is for tensors that can't be asked; every rank calls this at once.
    """
    if full is None:
        full = leaf.detach().full_tensor() if leaf.device_mesh.get_coordinate() else None
    found: tuple[Tensor, ...] = ()
    try:
        found = checked(leaf, name, full)
        said: Any = [tensor.spec for tensor in found]
    except Exception:
        said = traceback.format_exc()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, said)
    for one in every:
        assert not isinstance(one, str), one
    specs: list[Spec] = [spec for specs in every for spec in specs]
    assert gap([spec.box for spec in specs], Box((0,) * leaf.ndim, tuple(leaf.shape))) is None
    return found


def checked(leaf: Any, name: str, full: torch.Tensor | None) -> tuple[Tensor, ...]:
    found = look_all(leaf, name)
    for tensor in found:
        box, spec = tensor.spec.box, tensor.spec
        assert tuple(leaf.shape) == spec.full_shape, (spec, leaf.shape)
        assert spec.shape == box.shape == tensor.array.shape
        assert (spec.offset is None) == (spec.shape == spec.full_shape)
        assert str(leaf.dtype) == f"torch.{spec.dtype}"
        if full is not None:
            assert np.array_equal(tensor.array, look_all(full, "")[0].array[box.slices]), spec
    return found


def of_shape(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    count = int(np.prod(shape))
    return torch.arange(count).to(dtype).reshape(tuple(shape))


SHAPES = [(8, 4), (7, 5), (3, 2), (1, 9), (5,), (1,), (4, 3, 6), (0, 3), (2, 0)]


def one_axis() -> None:
    mesh = init_device_mesh("cpu", (4,))
    for shape in SHAPES:
        for placement in (Replicate(), *map(Shard, range(len(shape)))):
            for dtype in (torch.float32, torch.bfloat16):
                agree(distribute_tensor(of_shape(shape, dtype), mesh, [placement]))
    agree(distribute_tensor(torch.tensor(3.0), mesh, [Replicate()]))
    agree(nn.Parameter(distribute_tensor(of_shape((6, 2)), mesh, [Shard(0)])))


def two_axes() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    for shape in SHAPES:
        placements = [Replicate(), *map(Shard, range(len(shape)))]
        for pair in itertools.product(placements, repeat=2):
            agree(distribute_tensor(of_shape(shape), mesh, pair))


def strided() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    shards = 0
    for shape, split, last in itertools.product(
        [(8, 4), (7, 5), (9,), (2, 6)], (2, 3), (Shard(0), Shard(1), Replicate())
    ):
        if last == Shard(1) and len(shape) == 1:
            continue
        full = of_shape(shape)
        placements = [_StridedShard(0, split_factor=split), last]
        local = full
        for at, placement in enumerate(placements):
            if not placement.is_replicate():
                parts, _ = placement._split_tensor(local, 2, with_padding=False)
                local = parts[mesh.get_coordinate()[at]]
        leaf = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
        )
        shards = max(shards, len(agree(leaf, full=full)))
    assert shards > 1


class Model(nn.Module):  # type: ignore[misc, unused-ignore]
    """Three layers of sizes that no mesh divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(5, 7), nn.LayerNorm(7)
        self.second = nn.Linear(7, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.second(self.norm(self.first(inputs)).relu())
        return outputs


def trained(model: nn.Module) -> dict[str, Any]:
    """A state after a step: the model's, and Adam's."""
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]}


def check_state(state: dict[str, Any]) -> None:
    """Each of its tensors, the census of it, and a save and a restore by this rank alone."""
    leaves = list(state["model"].items())
    for at, moments in sorted(state["optimizer"].items()):
        leaves += [(f"{at}.{name}", one) for name, one in moments.items()]
    sharded = [(name, leaf) for name, leaf in leaves if isinstance(leaf, DTensor)]
    assert len(sharded) >= 6
    for name, leaf in sharded:
        agree(leaf, name)
    census = Census()
    first, again = census.take(state), census.take(state)
    assert first.roster is again.roster
    copies = [local_of(leaf).clone() for _, leaf in leaves]
    with tempfile.TemporaryDirectory() as folder:
        gpuckpt.save(folder, state)
        for _, leaf in leaves:
            local_of(leaf).zero_()
        with gpuckpt.Checkpointer(folder, group="alone") as ckpt:
            ckpt.restore(state)
    for (name, leaf), copy in zip(leaves, copies, strict=True):
        assert torch.equal(local_of(leaf), copy), name


def local_of(leaf: Any) -> torch.Tensor:
    leaf = leaf.detach()
    found: torch.Tensor = leaf.to_local() if isinstance(leaf, DTensor) else leaf
    return found


def fsdp() -> None:
    model = Model()
    mesh = init_device_mesh("cpu", (4,))
    for layer in (model.first, model.second, model):
        fully_shard(layer, mesh=mesh)
    check_state(trained(model))


def hsdp() -> None:
    model = Model()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
    check_state(trained(model))


def tensor_parallel() -> None:
    model = Model()
    plan = {"first": ColwiseParallel(output_layouts=Replicate()), "second": RowwiseParallel()}
    plan["second"] = RowwiseParallel(input_layouts=Replicate())
    parallelize_module(model, init_device_mesh("cpu", (4,)), plan)
    for name, leaf in model.state_dict().items():
        if isinstance(leaf, DTensor):
            agree(leaf, name)


def fsdp_of_tensor_parallel() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    leaves = model.state_dict()
    kinds = {type(placement) for leaf in leaves.values() for placement in leaf.placements}
    assert _StridedShard in kinds
    for name, leaf in leaves.items():
        agree(leaf, name)


def summands() -> None:
    mesh = init_device_mesh("cpu", (4,))
    leaf = DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False)
    for take in (lambda: look(leaf, "grad"), lambda: Census().take({"grad": leaf})):
        with pytest.raises(UnsupportedError, match=r"grad.*redistribute"):
            take()


def local_tensors_of_other_sizes() -> None:
    mesh = init_device_mesh("cpu", (4,))
    rank = dist.get_rank()
    local = torch.ones(rank + 1, 2)
    leaf = DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=torch.Size((10, 2)), stride=(2, 1)
    )
    expected = 3 if rank < 3 else 1
    if rank + 1 == expected:
        return
    with pytest.raises(UnsupportedError, match="Sharded"):
        look(leaf, "w")


def meshes_of_some_ranks() -> None:
    mesh = dist.device_mesh.DeviceMesh("cpu", [0, 2])
    for shape in [(8, 4), (5,)]:
        found = agree(distribute_tensor(of_shape(shape), mesh, [Shard(0)]))
        assert bool(found[0].spec.nbytes) == (dist.get_rank() in {0, 2})
        assert len(Census().take({"w": distribute_tensor(of_shape(shape), mesh, [Shard(0)])}).specs)
    scalar = distribute_tensor(torch.tensor(1.0), mesh, [Replicate()])
    if dist.get_rank() in {0, 2}:
        assert look(scalar, "lr") is not None
        return
    with pytest.raises(UnsupportedError, match="lr"):
        look(scalar, "lr")


def sharded_tensors() -> None:
    rank, full = dist.get_rank(), of_shape((11, 3))
    bounds = [(0, 2), (2, 3), (3, 3), (3, 6), (6, 7), (7, 9), (9, 11)]
    mine = [bounds[0:2], bounds[2:3], bounds[3:5], bounds[5:7]][rank]
    pieces = [
        Piece(full[a:b].clone(), ShardMetadata([a, 0], [b - a, 3], f"rank:{rank}/cpu"))
        for a, b in mine
        if a < b
    ]
    leaf = init_from_local_shards(pieces, 11, 3)
    assert len(agree(leaf, full=full)) == max(len(pieces), 1)
    census = Census()
    first = census.take({"w": leaf, "again": leaf, "lr": 0.1})
    assert len(first.specs) == max(len(pieces), 1)
    assert census.take({"w": leaf, "again": leaf, "lr": 0.2}).roster is first.roster


CHECKS = {
    check.__name__: check
    for check in (
        *(one_axis, two_axes, strided, fsdp, hsdp, tensor_parallel, fsdp_of_tensor_parallel),
        *(summands, local_tensors_of_other_sizes, meshes_of_some_ranks, sharded_tensors),
    )
}


def main(folder: str, rank: str, size: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=int(rank),
        world_size=int(size),
        timeout=timedelta(seconds=60),
    )
    tell(CHECKS, f"{folder}/{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
