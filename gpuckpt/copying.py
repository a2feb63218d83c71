"""Copy host memory in several threads at once: one thread doesn't use all that memory can give."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from gpuckpt.apart import Flag

# More than this many threads find no more bandwidth on common machines.
_THREADS_MAX = 4
# A thread isn't worth starting for less.
_LEAST_NBYTES = 4 << 20

Numbers = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Share:
    """What one thread copies: parts of some moves, `nbytes` each from `start` of move `at` on."""

    at: npt.NDArray[np.intp]
    start: Numbers
    nbytes: list[int]


def share_out(sizes: Sequence[int], threads: int | None = None) -> list[Share]:
    """Cut moves of these sizes, in bytes, into shares of about the same size.

    As many as there are cores for this process, four at most, and fewer for
    little; at least one.
    """
    cores = len(os.sched_getaffinity(0)) if threads is None else threads
    total = sum(sizes)
    count = max(min(cores, _THREADS_MAX, total // _LEAST_NBYTES), 1)
    ends = np.cumsum(np.array(sizes, np.int64)) if len(sizes) else np.empty(0, np.int64)
    bounds = [total * at // count // 64 * 64 for at in range(count)] + [total]
    return [_share(ends, low, high) for low, high in pairwise(bounds)]


def copy_shares(shares: Sequence[Share], targets: Numbers, sources: Numbers) -> None:
    """Copy each move from its source to its target, by their addresses; waits until all is done.

    Also if it is interrupted: then nobody writes to the targets any more.
    """
    first, *others = [_Job(_moves(share, targets, sources)) for share in shares]
    try:
        for job in others:
            job.start()
        for job in (first, *others):
            job.run()
    finally:
        _settle(others)
    for job in (first, *others):
        job.check()


class _Job:
    """A share's moves, done once, by whoever comes first."""

    def __init__(self, moves: Sequence[tuple[int, int, int]]) -> None:
        self._moves = moves
        # Reentrant, so that who was interrupted while taking it can take it again.
        self._claimed = threading.RLock()
        self.done = Flag()
        self._copied = False
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Let a thread come; without one, whoever waits does it.

        `threading`'s start waits for the thread in a way that an interrupt breaks.
        """
        with contextlib.suppress(RuntimeError, MemoryError):
            _thread.start_new_thread(self._run_apart, ())

    def run(self) -> None:
        """Do it, unless somebody does or has done it."""
        if not self._claimed.acquire(blocking=False):
            return
        try:
            if not self.done.is_set():
                _copy(self._moves)
                self._copied = True
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self.done.set()

    def check(self) -> None:
        """See that it was done; raises what kept it from that."""
        if not self._copied:
            raise self._failure or RuntimeError("a thread that copied died without a word")

    def _run_apart(self) -> None:
        with contextlib.suppress(BaseException):  # `check` raises it where it is waited for
            self.run()

    def settle(self) -> None:
        """From here on nobody does it: wait for him who does, and let nobody begin."""
        if self._claimed.acquire(blocking=False):
            self.done.set()
        else:
            self.done.wait_out()


def _settle(jobs: Sequence[_Job]) -> None:
    """Settle all, whatever interrupts; that is raised at the end."""
    first: BaseException | None = None
    while not all(job.done.is_set() for job in jobs):
        try:
            for job in jobs:
                job.settle()
        except BaseException as error:
            first = first or error
    if first is not None:
        raise first


def _share(ends: npt.NDArray[np.int64], low: int, high: int) -> Share:
    """The bytes from `low` to `high` of moves that end at these bytes."""
    begins = np.concatenate([[0], ends[:-1]]) if ends.size else ends
    at = np.flatnonzero((ends > low) & (begins < high))
    start = np.maximum(low - begins[at], 0)
    nbytes = np.minimum(ends[at], high) - begins[at] - start
    return Share(at, start.astype(np.uint64), nbytes.tolist())


def _moves(share: Share, targets: Numbers, sources: Numbers) -> list[tuple[int, int, int]]:
    to, source = targets[share.at] + share.start, sources[share.at] + share.start
    return list(zip(to.tolist(), source.tolist(), share.nbytes, strict=True))


def _copy(moves: Sequence[tuple[int, int, int]]) -> None:
    for target, source, nbytes in moves:
        ctypes.memmove(target, source, nbytes)  # lets go of the interpreter
