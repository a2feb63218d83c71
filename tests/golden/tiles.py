"""Write the golden checkpoint of chunks in tiles: `python -m tests.golden.tiles`.

It is written once, by the compiled loops, and stays as it is for ever: this
refuses to touch it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import gpuckpt
from gpuckpt.groups import Group
from tests.golden.describe import describe
from tests.golden.regenerate import SUMS, sums
from tests.ranks import run_ranks

HOME = Path(__file__).parent / "v1.tiles"
SIZE, STEP = 2, 1


def whole() -> dict[str, Any]:
    """The state of all ranks, as one process has it."""
    random = np.random.default_rng(8)
    return {
        "columns": random.standard_normal((128, 192), np.float32).astype(ml_dtypes.bfloat16),
        "rows": random.standard_normal((96, 2, 64), np.float32),
        "noise": random.integers(0, 2**16, (130, 128), np.uint16),
    }


def of_rank(rank: int) -> dict[str, Any]:
    """The state of one of them: half of the columns of one tensor, of the rows of the others."""
    found: dict[str, Any] = {}
    for name, array in whole().items():
        axis = int(name == "columns")
        offset, step = [0] * array.ndim, array.shape[axis] // SIZE
        offset[axis] = rank * step
        half = np.split(array, SIZE, axis)[rank]
        found[name] = gpuckpt.Sharded(np.ascontiguousarray(half), array.shape, offset)
    return found


def write(root: Path, codec: str = "zstd") -> None:
    """Save the step."""

    def work(group: Group) -> None:
        options: dict[str, Any] = {"codec": codec, "memory": "4 MiB", "chunk_nbytes": 64 << 10}
        with gpuckpt.Checkpointer(
            root, group=group, group_timeout=30, reshard="any", **options
        ) as ckpt:
            ckpt.save(STEP, of_rank(group.rank)).result(60)

    run_ranks(SIZE, work)
    (root / "lock").unlink(missing_ok=True)


def main() -> int:
    """Write it, unless it is there."""
    if HOME.exists():
        print(f"{HOME} is there, and golden files are never written again")
        return 1
    write(HOME / "two.zstd")
    (HOME / "two.json").write_text(
        json.dumps({STEP: describe(whole())}, separators=(",", ":")) + "\n"
    )
    (HOME / SUMS).write_text(sums(HOME))
    return 0


if __name__ == "__main__":
    sys.exit(main())
