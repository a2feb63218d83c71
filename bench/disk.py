"""What the disk alone does with the same bytes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


def write_and_sync(path: Path, arrays: Iterable[Any]) -> float:
    """Seconds for the plainest durable write of host arrays: write, fsync."""
    path.unlink(missing_ok=True)
    begun = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for array in arrays:
            view = array.view(np.uint8).data
            while view.nbytes:
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    return time.perf_counter() - begun


def read_through(path: Path, room_nbytes: int = 4 << 20) -> float:
    """Seconds for reading a file from its beginning to its end, into the same memory again."""
    room = memoryview(bytearray(room_nbytes))
    begun = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(room):
            pass
    return time.perf_counter() - begun


def fill_cache(directory: Path) -> None:
    """Read the files of a directory, so that the system has them cached: direct writes leave none.

    It may keep fewer.
    """
    for path in directory.iterdir():
        if path.is_file():
            read_through(path)


def drop_cache(directory: Path) -> None:
    """Ask the system to forget what it has cached of the files of a directory.

    It may keep some: a cold read is cold as far as the kernel heeds this.
    """
    for path in directory.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
