"""One of several ranks that share a GPU; `test_ranks_on_gpu.py` starts them.

    python -m tests.cuda.rank_on_gpu '{"root": …, "rank": 0, "size": 2, …}'

Their process group is NCCL's, of which gpuckpt uses the key-value store alone:
NCCL itself would refuse two ranks on one device.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import gpuckpt

ROWS, WIDTH = 4001, 640


def main() -> None:
    """Save steps, or resume, and say which step it is at."""
    told = json.loads(sys.argv[1])
    rank, size = told["rank"], told["size"]
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(told["port"])})
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", rank=rank, world_size=size)
    mesh = DeviceMesh("cuda", list(range(size)), _init_backend=False)
    state = state_at(0, mesh, told["axis"])
    options = {"snapshot": told["snapshot"], "codec": told["codec"], "group": "torch"}
    with gpuckpt.Checkpointer(told["root"], memory="256 MiB", group_timeout=20, **options) as ckpt:
        done = ckpt.resume(state)
        assert is_at(state, done, mesh, told["axis"]), f"rank {rank} isn't at step {done}"
        for step in range(done + 1, told["last"] + 1):
            with ckpt.update():
                go_to(state, step, mesh, told["axis"])
            pending = ckpt.save(step, state)
            if (rank, step) == (told.get("dies"), told["last"]):
                os.kill(os.getpid(), signal.SIGKILL)
            pending.result(60)
    print(json.dumps({"step": max(done, told["last"]), "resumed": done}))
    dist.destroy_process_group()


def whole(name: str, step: int) -> torch.Tensor:
    """What a tensor is at a step, on the GPU."""
    numbers = torch.arange(ROWS * WIDTH, device="cuda", dtype=torch.int64)
    mixed = (numbers * 2_654_435_761 + step * 97 + len(name)) % 65_521
    values = (mixed.to(torch.float32) / 65_521 - 0.5).reshape(ROWS, WIDTH)
    return values.to(torch.bfloat16) if name == "weight" else values


def placed(name: str, step: int, mesh: DeviceMesh, axis: int) -> DTensor:
    """This rank's part of it; nothing is communicated."""
    full = whole(name, step)
    if name == "same":
        return DTensor.from_local(full, mesh, [Replicate()], run_check=False)
    parts = full.chunk(mesh.size(), axis)
    rank = dist.get_rank()
    own = parts[rank].contiguous() if rank < len(parts) else full.narrow(axis, 0, 0)
    place = [Shard(axis)]
    return DTensor.from_local(
        *(own, mesh, place), run_check=False, shape=full.shape, stride=full.stride()
    )


def state_at(step: int, mesh: DeviceMesh, axis: int) -> dict[str, Any]:
    """A model's tensors at a step."""
    return {name: placed(name, step, mesh, axis) for name in ("weight", "moment", "same")}


def go_to(state: dict[str, Any], step: int, mesh: DeviceMesh, axis: int) -> None:
    """Change every tensor in place."""
    for name, tensor in state.items():
        tensor.to_local().copy_(placed(name, step, mesh, axis).to_local())


def is_at(state: dict[str, Any], step: int, mesh: DeviceMesh, axis: int) -> bool:
    """Whether every tensor is what it is at a step, bit for bit."""
    return all(
        torch.equal(tensor.to_local(), placed(name, step, mesh, axis).to_local())
        for name, tensor in state.items()
    )


if __name__ == "__main__":
    main()
