"""What a loop does without gpuckpt: copy every tensor to the host, then `torch.save`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.gpu.contents import state_nbytes, state_of
from bench.gpu.scale import Scale
from bench.timing import spreads


def peer_rows(directory: Path, scale: Scale) -> Iterator[dict[str, Any]]:
    """Nothing where there is no torch with CUDA."""
    try:
        import torch
    except ImportError:
        return
    if not torch.cuda.is_available():
        return
    for nbytes in scale.states_nbytes:
        for tensors in (scale.few, scale.many):
            arrays = state_of(nbytes, tensors)
            state = {name: torch.as_tensor(array, device="cuda") for name, array in arrays.items()}
            rounds = scale.rounds_of(nbytes) + 1
            rows = [_save(torch, state, directory / "peer.pt") for _ in range(rounds)][1:]
            yield {
                "case": "torch.save",
                "torch": str(torch.__version__),
                "tensors": tensors,
                "state_nbytes": state_nbytes(arrays),
                **spreads(rows),
            }


def _save(torch: Any, state: dict[str, Any], path: Path) -> dict[str, float]:
    """`stall_s` until the copies are on the host, `save_s` until they are durable, in all."""
    torch.cuda.synchronize()
    path.unlink(missing_ok=True)
    begun = time.perf_counter()
    copies = {name: tensor.cpu() for name, tensor in state.items()}
    stall = time.perf_counter() - begun
    with path.open("wb") as file:
        torch.save(copies, file)
        file.flush()
        os.fsync(file.fileno())
    return {"stall_s": stall, "save_s": time.perf_counter() - begun}
