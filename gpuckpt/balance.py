"""Whether a save waits for its encoders or for its disk, while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

# A save may last this much longer than one that encodes nothing: a share of what has passed, and
# a moment in which the pipeline fills and states that are small are done.
_SHARE = 0.04
_GRACE_SECONDS = 0.25
# Encoders that do something else for more than this share of the time wait themselves: for copies
# from a device, which it doesn't help to leave as they are.
_BUSY = 0.5


class Balance:
    """Watches how long the writer had nothing to write.

    While it waits for encoders, encoding costs time: the disk could have
    written the same bytes as they are.  While it doesn't, encoding is free.
    One thread draws; any may ask.
    """

    def __init__(self, workers: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._workers, self._clock = workers, clock
        self._begun = clock()
        self._waited = self._encoding = 0.0

    @property
    def waited_seconds(self) -> float:
        """How long the writer waited so far."""
        return self._waited

    @property
    def encoding_costs_time(self) -> bool:
        """Whether the writer has waited longer than it may, for encoders that are busy."""
        passed = self._clock() - self._begun
        busy = self._encoding > _BUSY * self._workers * passed
        return busy and self._waited > _GRACE_SECONDS + _SHARE * passed

    def encoded(self, seconds: float) -> None:
        """Take note of what an encoder spent on something that was drawn."""
        self._encoding += seconds

    def watched(self, results: Iterable[T]) -> Iterator[T]:
        """The same, drawn by the writer, who waits for each."""
        drawn = iter(results)
        while True:
            begun = self._clock()
            try:
                result = next(drawn)
            except StopIteration:
                return
            finally:
                self._waited += self._clock() - begun
            yield result
