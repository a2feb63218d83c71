"""Make `dcp` anew by torch 2.13: python -m tests.convert.golden.regenerate."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

if __name__ == "__main__":
    weights = torch.arange(6.0).reshape(2, 3)
    bias = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    state = {"model": {"w": weights, "b": bias}, "step": 3, "groups": [{"lr": 0.1}]}
    dcp.save(state, checkpoint_id=Path(__file__).parent / "dcp", no_dist=True)
