"""What ranks of `test_torch_ranks.py` do: `tests.launch` calls these in processes of their own."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gpuckpt
import gpuckpt.torch
from tests.frameworks.same import frozen


def wrapped(kind: str, seed: int) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Dropout(0.2), nn.Linear(24, 4))
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "plain":
        return model
    return fully_shard(model, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))


def train(group: Any, arguments: dict[str, Any]) -> str:
    """Train from the newest checkpoint to step `stop`; a digest of this rank's state."""
    torch.set_num_threads(1)
    model = wrapped(arguments["kind"], arguments["seed"])
    torch.manual_seed(100 + group.rank)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=99)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    every = gpuckpt.Every(steps=1)
    with gpuckpt.torch.training(arguments["root"], every=every, **parts) as run:
        while run.done < arguments["stop"]:
            drawn = torch.Generator().manual_seed(10 * run.done + group.rank)
            optimizer.zero_grad()
            model(torch.randn(6, 8, generator=drawn)).square().mean().backward()
            optimizer.step()
            scheduler.step()
            run.step()
    mine = {name: local(one) for name, one in model.state_dict().items()}
    moments = [[local(one) for one in state.values()] for state in optimizer.state.values()]
    found = frozen([mine, moments, scheduler.state_dict()])
    return hashlib.sha256(repr(found).encode()).hexdigest()


def local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
