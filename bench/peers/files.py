"""What is done to a peer's files from outside: sync, count, forget from the cache, read."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Make a file's bytes, or a directory's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Make everything below durable: files first, then the directories that name them."""
    for at, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync(Path(at) / name)
        sync(Path(at))


def files_below(directory: Path) -> list[Path]:
    """All files, at any depth."""
    return [Path(at) / name for at, _, names in os.walk(directory) for name in names]


def nbytes_below(directory: Path) -> int:
    """Bytes that the files below hold."""
    return sum(path.stat().st_size for path in files_below(directory))


def forget(directory: Path) -> None:
    """Ask the kernel to drop what it has cached of the files below; they must be synced."""
    for path in files_below(directory):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(directory: Path, room_nbytes: int = 4 << 20) -> None:
    """Bring the files below into the cache."""
    room = memoryview(bytearray(room_nbytes))
    for path in files_below(directory):
        with path.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass
