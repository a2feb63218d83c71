"""What the machine alone does with the same bytes."""

from __future__ import annotations

import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bench.scaling.states import State
from bench.write import bare
from gpuckpt.stores.blocks import BLOCK_NBYTES

PIECE_NBYTES = 4 << 20
THREADS = 2


def memcpy(state: State, warm: State) -> float:
    """Seconds for copying the state into warm memory, in one thread."""
    begun = time.perf_counter()
    for name, array in state.items():
        np.copyto(warm[name], array)
    return time.perf_counter() - begun


def write_and_read(path: Path, nbytes: int) -> dict[str, float]:
    """Seconds for an O_DIRECT write with fsync, and for a cold and a warm read by two threads.

    Of a file of `nbytes`, a multiple of 8 MiB, which is deleted again.
    """
    path.unlink(missing_ok=True)
    block = np.random.default_rng(1).integers(0, 256, BLOCK_NBYTES, np.uint8)
    begun = time.perf_counter()
    bare(path, block, nbytes)
    written = time.perf_counter() - begun
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    cold = read(path, nbytes)
    row = {"write_s": written, "read_cold_s": cold, "read_warm_s": read(path, nbytes)}
    path.unlink()
    return row


def read(path: Path, nbytes: int) -> float:
    """Seconds for reading a file by two threads, each into the same piece of memory again."""
    rooms = [mmap.mmap(-1, PIECE_NBYTES) for _ in range(THREADS)]
    for room in rooms:
        room[:] = bytes(PIECE_NBYTES)
    descriptor = os.open(path, os.O_RDONLY)

    def every(which: int) -> None:
        for at in range(which * PIECE_NBYTES, nbytes, THREADS * PIECE_NBYTES):
            os.preadv(descriptor, [rooms[which]], at)

    try:
        with ThreadPoolExecutor(THREADS) as threads:
            begun = time.perf_counter()
            list(threads.map(every, range(THREADS)))
            return time.perf_counter() - begun
    finally:
        os.close(descriptor)
