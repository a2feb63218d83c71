"""`python -m bench.censuses`: what it costs to recognise 3,000 leaves, sharded and not.

Kinds take turns, and each time (the thread's, on a CPU) is divided by plain
torch's of the same turn; by numpy's, where there is no torch.  Python's cyclic
garbage collector waits meanwhile.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuckpt import Sharded
from gpuckpt.census import Census

LEAVES, TURNS = 3000, 60


def main() -> int:
    """Run and print."""
    with tempfile.TemporaryDirectory() as directory:
        makers = {**_of_numpy(), **_of_torch(directory)}
        states = {kind: _layers(make) for kind, make in makers.items()}
        censuses = {kind: Census() for kind in states}
        first = {kind: _milliseconds(censuses[kind], state) for kind, state in states.items()}
        gc.disable()
        turns = [
            {kind: _milliseconds(censuses[kind], state) for kind, state in states.items()}
            for _ in range(TURNS)
        ]
        gc.enable()
    for kind in states:
        times = [turn[kind] for turn in turns]
        base = "torch" if "torch" in states else "numpy"
        ratios = [turn[kind] / turn[base] for turn in turns]
        print(
            f"{kind:16} {statistics.median(times):6.2f} ms ({min(times):.2f} to {max(times):.2f}), "
            f"{statistics.median(ratios):.2f} of {base}'s ({min(ratios):.2f} to "
            f"{max(ratios):.2f}); the first time {first[kind]:.0f} ms"
        )
    return 0


def _layers(make: Callable[[], Any]) -> dict[str, Any]:
    return {str(at): {name: make() for name in ("w", "m", "v")} for at in range(LEAVES // 3)}


def _milliseconds(census: Census, state: Any) -> float:
    begun = time.thread_time()
    census.take(state)
    return 1000 * (time.thread_time() - begun)


def _of_numpy() -> dict[str, Callable[[], Any]]:
    return {
        "numpy": lambda: np.zeros((4, 4), np.float32),
        "Sharded of numpy": lambda: Sharded(np.zeros((4, 4), np.float32), (8, 4), (4, 0)),
    }


def _of_torch(directory: str) -> dict[str, Callable[[], Any]]:
    try:
        import torch
        from torch import distributed
        from torch.distributed.tensor import DTensor, Shard, init_device_mesh
    except ImportError:
        return {}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    where = f"file://{directory}/meet"
    distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    return {
        "torch": lambda: torch.zeros(4, 4),
        "Sharded of torch": lambda: Sharded(torch.zeros(4, 4), (8, 4), (4, 0)),
        "DTensor": lambda: DTensor.from_local(torch.zeros(4, 4), mesh, [Shard(0)], run_check=False),
    }


if __name__ == "__main__":
    sys.exit(main())
