"""How fast memory is copied, a disk written and read, and a GPU's bus crossed, at best."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpuckpt.copying import copy_shares, share_out
from gpuckpt.layout import HEADER
from gpuckpt.stores.local import LocalStore

ROUNDS = 3
_PIECE_NBYTES = 4 << 20
# More than any cache holds, and soon done.
_MOST_COPIED = 512 << 20


@dataclass(frozen=True, slots=True)
class Rate:
    """Bytes a second: the best of some rounds, and the worst."""

    what: str
    best: float
    worst: float


def memory_rate(nbytes: int, rounds: int = ROUNDS) -> Rate:
    """Copying host memory as a snapshot does: in several threads.  Bytes are counted once."""
    nbytes = min(nbytes, _MOST_COPIED)
    source, target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
    shares = share_out([nbytes])
    places = [np.array([one.ctypes.data], np.uint64) for one in (target, source)]
    return _rate("copy memory", nbytes, lambda: copy_shares(shares, *places), rounds)


def disk_rates(directory: Path, nbytes: int, rounds: int = ROUNDS) -> list[Rate]:
    """Writing a file as a save does, past the page cache where that can be, with its sync.

    And reading it back, the system asked to forget it first.  The file is removed.
    """
    store, name = LocalStore(directory / "disk"), "file"
    piece = np.random.default_rng(7).integers(0, 256, _PIECE_NBYTES, np.uint8)
    count = max(nbytes // piece.size, 1)

    def write() -> None:
        file = store.create(name)
        try:
            file.append([bytes(HEADER.size)])
            for _ in range(count):
                file.append([piece.data])
            file.sync()
        finally:
            file.close()

    def forget() -> None:
        with open(Path(store.root) / name, "rb") as file:  # noqa: PTH123
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    room = memoryview(bytearray(piece.size))

    def read() -> None:
        with store.open(name) as file:
            for at in range(count):
                file.read_into(at * piece.size, room)

    total = count * piece.size
    written = _rate("write to the disk", total, write, rounds, lambda: store.remove(name))
    found = [written, _rate("read from the disk", total, read, rounds, forget)]
    store.remove(name)
    return found


def bus_rates(nbytes: int, rounds: int = ROUNDS) -> list[Rate]:
    """From the current GPU to page-locked memory, and back; nothing without a GPU."""
    if not has_gpu():
        return []
    import cupy

    nbytes = min(nbytes, _MOST_COPIED)
    host = np.frombuffer(cupy.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)
    host[:] = 1
    device = cupy.ones(nbytes, np.uint8)
    stream = cupy.cuda.get_current_stream()

    def fetch() -> None:
        device.get(out=host)
        stream.synchronize()

    def send() -> None:
        device.set(host)
        stream.synchronize()

    return [
        _rate("from the GPU", nbytes, fetch, rounds),
        _rate("to the GPU", nbytes, send, rounds),
    ]


def has_gpu() -> bool:
    """Whether CuPy is there, with a device that answers."""
    try:
        import cupy

        return bool(cupy.cuda.runtime.getDeviceCount())
    except Exception:  # whatever is wrong with it, there is none to be measured
        return False


def _rate(
    what: str,
    nbytes: int,
    work: Callable[[], Any],
    rounds: int,
    prepare: Callable[[], Any] = lambda: None,
) -> Rate:
    took = []
    for _ in range(rounds):
        prepare()
        begun = time.perf_counter()
        work()
        took.append(time.perf_counter() - begun)
    return Rate(what, nbytes / min(took), nbytes / max(took))
