"""How much slower the loop's steps are while a save is in flight."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

_REMEMBERED = 50


class Meter:
    """Times a loop from step to step, those beside a save apart from the others.

    Time that the caller was blocked by a save is none of a step's.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last: float | None = None
        self._undisturbed: deque[float] = deque(maxlen=_REMEMBERED)
        self._beside: list[float] = []

    def step(self, *, busy: bool) -> None:
        """A step has ended; `busy`: a save was in flight in it."""
        now = self._clock()
        if self._last is not None:
            (self._beside if busy else self._undisturbed).append(now - self._last)
        self._last = now

    def restart(self) -> None:
        """The caller goes on only now: what was before is no step's time."""
        self._last = self._clock()

    @property
    def knows(self) -> bool:
        """Whether a step without a save was seen."""
        return bool(self._undisturbed)

    def slowdown_seconds(self) -> float:
        """What the steps beside the save took more than others do, in all; forgets them.

        0 if no step without a save was seen.
        """
        beside, self._beside = self._beside, []
        if not self._undisturbed:
            return 0.0
        usual = statistics.median(self._undisturbed)
        # In all: by chance some steps take longer, and others less.
        return max(sum(beside) - usual * len(beside), 0.0)
