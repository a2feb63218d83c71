"""Ranks as threads of one process, which meet on a board in memory.

Real processes are started by `tests/launch.py`, and tested in this folder.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from gpuckpt.groups.meeting import Meeting
from gpuckpt.groups.threads import MemoryBoard

R = TypeVar("R")


def run_ranks(
    size: int, work: Callable[[Meeting], R], *, board: MemoryBoard | None = None, grace: float = 5.0
) -> list[R]:
    """What each of `size` ranks makes of its group, by rank; the first error is raised."""
    board = MemoryBoard() if board is None else board
    with ThreadPoolExecutor(size) as pool:
        groups = [Meeting(board, rank, size, grace=grace) for rank in range(size)]
        futures = [pool.submit(work, group) for group in groups]
        return [future.result() for future in futures]
