"""Whether a save waits for its encoders or for its disk, while it goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

# As long as so many bytes wait for the disk, it has work until a chunk is encoded.
AHEAD_NBYTES = 12 << 20
# The disk may have had nothing to do for this share of a save, and a moment at its beginning.
_IDLE_SHARE, _IDLE_SECONDS = 0.02, 0.005
# Encoders that do something else for more than this share of the time wait themselves: for copies
# from a device, which it doesn't help to leave as they are.
_BUSY = 0.5
# A sync takes so long even of next to nothing, and up to this share of a save.
_SYNC_SECONDS, _SYNC_SHARE = 0.01, 0.02


class Balance:
    """Watches whether the disk has work.

    While enough waits for it, encoding is free.  While it doesn't, encoding
    costs time: the disk could write the same bytes as they are.  One thread
    draws, any may ask.
    """

    def __init__(
        self,
        workers: int,
        waiting: Callable[[], int],
        *,
        enough_nbytes: int = AHEAD_NBYTES,
        free_seconds: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`waiting()` are the bytes that the storage has taken, and not written.

        For `free_seconds` the writer may wait without a cost: see `next_free_seconds`.
        """
        self._workers, self._waiting, self._clock = workers, waiting, clock
        self._enough, self._free = enough_nbytes, free_seconds
        self._begun = clock()
        self._waited = self._idle = self._encoding = 0.0
        self._made = self._taken = 0
        self._draws = False
        self._lock = threading.Lock()

    @property
    def waited_seconds(self) -> float:
        """How long the writer waited so far."""
        return self._waited

    @property
    def encoding_costs_time(self) -> bool:
        """Whether the disk would have to wait for busy encoders."""
        passed = self._clock() - self._begun
        if self._waited < self._free or self._encoding <= _BUSY * self._workers * passed:
            return False
        # While the writer waits for a chunk, those after it can't be written either.
        ahead = self._waiting() + (0 if self._draws else self._made - self._taken)
        return ahead < self._enough or self._idle > _IDLE_SECONDS + _IDLE_SHARE * passed

    def keeps_at_most(self, nbytes: int) -> None:
        """No more than so much can wait for a storage that doesn't take it."""
        self._enough = min(self._enough, max(nbytes * 3 // 4, 1))

    def encoded(self, seconds: float, nbytes: int) -> None:
        """Take note of chunks for the disk, `nbytes` in memory, and of what encoding them took."""
        with self._lock:
            self._encoding += seconds
            self._made += nbytes

    def taken(self, nbytes: int) -> None:
        """Take note of those that the storage has taken: for the one who draws."""
        self._taken += nbytes

    def next_free_seconds(self, sync_seconds: float) -> float:
        """For how long the writer of the next save may wait without a cost.

        When this one had nothing left to write, the storage still had
        `sync_seconds` of work, of which nobody knew: that much longer it would
        have been busy without being given anything.
        """
        used = min(self._waited, self._free)
        spare = sync_seconds - _SYNC_SECONDS - _SYNC_SHARE * (self._clock() - self._begun)
        return used + spare if spare > 0 else used / 2

    def watched(self, results: Iterable[T]) -> Iterator[T]:
        """The same, drawn by the writer, who waits for each."""
        drawn = iter(results)
        while True:
            begun = self._clock()
            self._draws = True
            try:
                result = next(drawn)
            except StopIteration:
                return
            finally:
                self._draws = False
                waited = self._clock() - begun
                self._waited += waited
                self._idle += 0.0 if self._waiting() else waited
            yield result
