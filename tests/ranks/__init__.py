"""Ranks as threads of one process, which meet on a board in memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from gpuckpt.groups.meeting import Meeting
from gpuckpt.groups.threads import MemoryBoard

R = TypeVar("R")


def run_ranks(size: int, work: Callable[[Meeting], R]) -> list[R]:
    """What each of `size` ranks makes of its group, by rank; the first error is raised."""
    board = MemoryBoard()
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(work, Meeting(board, rank, size)) for rank in range(size)]
        return [future.result() for future in futures]
