"""What bringing a file to the disk costs: each way to write, beside the disk's own limit.

Every round writes the same bytes in each way, one after the other, in a new
order: directly and through the page cache by a `LocalStore`, and by a bare loop
of direct writes of one aligned block, which is as fast as one thread can be.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import gpuckpt
from bench.cases import state_of
from bench.timing import Spread, spread, spreads
from gpuckpt.stores.blocks import BLOCK_NBYTES, aligned_memory
from gpuckpt.stores.local import LocalStore

ROUNDS = 9  # one more is run first and not counted
SEED = 7
CHUNK_NBYTES = 4 << 20
GIB = 1 << 30
Way = Callable[[Path, npt.NDArray[np.uint8], int], None]


def write(directory: Path, nbytes: int) -> dict[str, Any]:
    """GB/s to durable, and CPU seconds of this process for each GiB, of each way.

    The bytes come in chunks of four parts of odd lengths, as planes do.
    """
    directory.mkdir()
    source = np.random.default_rng(SEED).integers(0, 256, CHUNK_NBYTES - 1000, np.uint8)
    rounds = list(_rounds(directory, source, nbytes))[1:]
    names = list(rounds[0])
    return {
        "case": "write",
        "nbytes": nbytes,
        "durable": True,
        **{f"{name}_gb_s": spread([row[name][0] for row in rounds]) for name in names},
        **{f"{name}_cpu_s_gib": spread([row[name][1] for row in rounds]) for name in names},
        "direct_over_cached": spread([row["direct"][0] / row["cached"][0] for row in rounds]),
        "direct_over_bare": spread([row["direct"][0] / row["bare"][0] for row in rounds]),
        "cpu_over_cached": spread([row["direct"][1] / row["cached"][1] for row in rounds]),
    }


def _rounds(
    directory: Path, source: npt.NDArray[np.uint8], nbytes: int
) -> Iterator[dict[str, tuple[float, float]]]:
    ways: dict[str, Way] = {"direct": _Appended(), "cached": _Appended(refused=True), "bare": bare}
    rng = random.Random(SEED)
    for _ in range(ROUNDS + 1):
        row = {}
        for name in rng.sample(sorted(ways), len(ways)):
            path = directory / name
            path.unlink(missing_ok=True)
            begun, cpu = time.perf_counter(), time.process_time()
            ways[name](path, source, nbytes)
            seconds, used = time.perf_counter() - begun, time.process_time() - cpu
            row[name] = (nbytes / seconds / 1e9, used / (nbytes / GIB))
            path.unlink()
        yield row


def saves(directory: Path, nbytes: int, tensors: int, codec: str) -> dict[str, Any]:
    """Whole saves, direct and cached in turn; and a restore after each, before anything else reads.

    After a direct save it comes from the disk, after a cached one from memory.
    """
    state = state_of(nbytes, tensors)
    target = {name: np.zeros_like(array) for name, array in state.items()}
    rng, rows = random.Random(SEED), []
    for _ in range(ROUNDS + 1):
        row: dict[str, float] = {}
        for name in rng.sample(["direct", "cached"], 2):
            root = directory / name
            store = LocalStore(root)
            store.blocks.refused = name == "cached"
            begun, cpu = time.perf_counter(), time.process_time()
            gpuckpt.save(root, state, codec=codec, store=store)
            row[f"save_{name}_s"] = time.perf_counter() - begun
            row[f"cpu_{name}_s"] = time.process_time() - cpu
            with gpuckpt.Checkpointer(root) as ckpt:
                begun = time.perf_counter()
                ckpt.restore(target)
                row[f"restore_{name}_s"] = time.perf_counter() - begun
        rows.append(row)
    known: dict[str, Spread] = spreads(rows[1:])
    for what in ("save", "cpu", "restore"):
        pairs = [(row[f"{what}_direct_s"], row[f"{what}_cached_s"]) for row in rows[1:]]
        known[f"{what}_direct_over_cached"] = spread([one / other for one, other in pairs])
    return {"case": f"write-save-{codec}", "state_nbytes": nbytes, "durable": True, **known}


class _Appended:
    """A file that a `LocalStore` writes; the store stays from file to file."""

    def __init__(self, *, refused: bool = False) -> None:
        """`refused`: as where the file system refuses direct writes."""
        self._refused = refused
        self._store: LocalStore | None = None

    def __call__(self, path: Path, source: npt.NDArray[np.uint8], nbytes: int) -> None:
        if self._store is None:
            self._store = LocalStore(path.parent)
        self._store.blocks.refused = self._refused
        file = self._store.create(path.name)
        plane = source.size // 4
        parts = [source[at * plane : (at + 1) * plane].data for at in range(4)]
        while file.offset < nbytes:
            file.append(parts)
        file.sync()
        file.close()


def bare(path: Path, source: npt.NDArray[np.uint8], nbytes: int) -> None:
    """Write one aligned block again and again, past the page cache, and sync."""
    block = aligned_memory(BLOCK_NBYTES)
    block[: source.size] = source
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
    try:
        for offset in range(0, nbytes, BLOCK_NBYTES):
            assert os.pwrite(descriptor, block.data, offset) == BLOCK_NBYTES
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
