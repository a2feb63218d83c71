"""Write the golden checkpoint of four ranks: `python -m tests.golden.ranks`.

It is written once, and stays as it is for ever: this refuses to touch it.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

import gpuckpt
from gpuckpt.groups import Group
from tests.golden.describe import describe
from tests.golden.regenerate import SUMS, sums
from tests.ranks import run_ranks

HOME = Path(__file__).parent / "v1.ranks"
SIZE, STEPS = 4, (1, 2)
ROWS = (0, 4, 7, 10, 10)  # the last rank has none


def whole(step: int) -> dict[str, Any]:
    """The state of all ranks, as one process has it."""
    random = np.random.default_rng(7)
    return {
        "w": random.standard_normal((32, 20)).astype(np.float32),
        "b": np.arange(-2, 3, dtype=np.int16),
        "scale": np.array(2.5),
        "lr": 0.1,
        "table": np.arange(30, dtype=np.float64).reshape(10, 3) * step,
        "grid": random.standard_normal((6, 8)).astype(ml_dtypes.bfloat16),
        "own": {rank: own(rank, step) for rank in range(SIZE)},
    }


def own(rank: int, step: int) -> dict[str, Any]:
    """What a rank has of its own."""
    return {"at": [rank, step], "noise": np.arange(rank + 1, dtype=np.uint8)}


def of_rank(rank: int, step: int) -> dict[str, Any]:
    """The state of one of them: replicas, rows of a table, a cell of a grid, its own."""
    state = whole(step)
    first, last = ROWS[rank], ROWS[rank + 1]
    y, x = divmod(rank, 2)
    state["table"] = gpuckpt.Sharded(state["table"][first:last], (10, 3), (first, 0))
    cell = state["grid"][3 * y : 3 * y + 3, 5 * x : 5 + 3 * x]
    state["grid"] = gpuckpt.Sharded(np.ascontiguousarray(cell), (6, 8), (3 * y, 5 * x))
    state["own"] = gpuckpt.PerRank(own(rank, step))
    return state


def write(root: Path, codec: str = "raw", memory: str = "4 MiB") -> None:
    """Save both steps; the small tensors are cut, as large ones would be."""

    def work(group: Group) -> None:
        options: dict[str, Any] = {"codec": codec, "memory": memory, "chunk_nbytes": 64 << 10}
        with gpuckpt.Checkpointer(root, group=group, group_timeout=30, **options) as ckpt:
            for step in STEPS:
                state = of_rank(group.rank, step)
                ckpt.save(step, state, metrics={"loss": 1 / step}).result(60)

    with (
        mock.patch("gpuckpt.spreading.PIECE_COUNT", 64),
        mock.patch("gpuckpt.sharing.TINY_NBYTES", 256),
        mock.patch("gpuckpt.sharing.SAMPLE_COUNT", 16),
    ):
        run_ranks(SIZE, work)
    (root / "lock").unlink(missing_ok=True)


def main() -> int:
    """Write it, unless it is there."""
    if HOME.exists():
        print(f"{HOME} is there, and golden files are never written again")
        return 1
    write(HOME / "four.raw")
    expected = {step: describe(whole(step)) for step in STEPS}
    (HOME / "four.json").write_text(json.dumps(expected, separators=(",", ":")) + "\n")
    (HOME / SUMS).write_text(sums(HOME))
    return 0


if __name__ == "__main__":
    sys.exit(main())
