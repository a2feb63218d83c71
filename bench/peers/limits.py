"""What the machine alone does with the same bytes: memcpy, a direct write, a cold read."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bench.peers.cache import Workload

LIMITS = "limits"  # in the place of a peer's name
PIECE = 4 << 20  # bytes of one write or read, of which two are under way
ATTEMPTS = 2  # of each, the best of which is the limit


def limits(workload: Workload, directory: Path) -> dict[str, float]:
    """Seconds for one checkpoint's bytes: `memcpy`, `write`, `read_cold`, `read_warm`.

    memcpy goes from warm memory to warm memory, in one thread.  The write is
    O_DIRECT to a new file, then fsync of it and of the directory.
    """
    source = workload.load("after")
    target = {name: np.ones_like(array) for name, array in source.items()}
    copies = []
    for _ in range(2 * ATTEMPTS):
        begun = time.perf_counter()
        for name, array in source.items():
            np.copyto(target[name], array)
        copies.append(time.perf_counter() - begun)
    del source, target
    path = directory / "limit.bin"
    with _pages(workload.directory / "after.bin") as pages:
        writes, colds, warms = [], [], []
        for _ in range(ATTEMPTS):
            path.unlink(missing_ok=True)
            writes.append(_write(path, pages))
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            colds.append(_read(path, pages))
            warms.append(_read(path, pages))
    path.unlink()
    return {
        "memcpy_s": min(copies),
        "write_s": min(writes),
        "read_cold_s": min(colds),
        "read_warm_s": min(warms),
    }


@contextlib.contextmanager
def _pages(path: Path) -> Iterator[memoryview]:
    """A file's bytes in page-aligned memory, filled up to whole pages."""
    nbytes = -(-path.stat().st_size // mmap.PAGESIZE) * mmap.PAGESIZE
    with (
        mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory,
        memoryview(memory) as view,
    ):
        with path.open("rb", buffering=0) as file:
            at = 0
            while count := file.readinto(view[at:]):
                at += count
        yield view


def _write(path: Path, pages: memoryview) -> float:
    begun = time.perf_counter()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    descriptor = _open_direct(path, flags)
    try:
        _each_piece(len(pages), lambda at: os.pwrite(descriptor, pages[at : at + PIECE], at))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    names = os.open(path.parent, os.O_RDONLY)
    os.fsync(names)
    os.close(names)
    return time.perf_counter() - begun


def _open_direct(path: Path, flags: int) -> int:
    """Past the page cache, where the file system can (some in memory can't)."""
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError:
        path.unlink(missing_ok=True)
        return os.open(path, flags, 0o644)


def _read(path: Path, pages: memoryview) -> float:
    begun = time.perf_counter()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _each_piece(len(pages), lambda at: os.preadv(descriptor, [pages[at : at + PIECE]], at))
    finally:
        os.close(descriptor)
    return time.perf_counter() - begun


def _each_piece(nbytes: int, move: Callable[[int], int]) -> None:
    offsets = range(0, nbytes, PIECE)
    with ThreadPoolExecutor(2) as threads:
        moved = sum(threads.map(move, offsets))
    assert moved == nbytes, f"{moved} bytes were moved, {nbytes} wanted"
