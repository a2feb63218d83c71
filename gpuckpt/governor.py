"""When to save, and how much of the machine a save may take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from gpuckpt.cores import Cores
from gpuckpt.effort import Effort, Efforts, Worth, efforts_of, fitting
from gpuckpt.meter import Meter
from gpuckpt.schedule import Every, Schedule
from gpuckpt.stats import Stats

# A save that takes more than this share of the time from save to save has none to lose.
_PRESSED = 0.5


class Governor:
    """Watches a loop and its saves, and says what the next save may take.

    With `Every(overhead=)` it learns from what saves have cost; without, it
    goes by the cores that the loop leaves over, with `codec="auto"` alone.
    """

    def __init__(
        self,
        every: Every | None,
        codec: str,
        workers: int,
        clock: Callable[[], float] = time.perf_counter,
        cores: Cores | None = None,
    ) -> None:
        """`workers` is the most threads."""
        self.every = every
        self._schedule: Schedule | None = None
        if every is not None:
            self._schedule = Schedule(every, clock)
        self._codec, self._workers, self._clock = codec, workers, clock
        self._meter, self._cores = Meter(clock), cores or Cores()
        self._efforts: Efforts | None = None
        self._worth = Worth()
        if every is not None and every.overhead is not None:
            self._efforts = Efforts(efforts_of(codec, workers), every.overhead)
        self._begun: float | None = None
        self._pressed = False
        self._interval = float("inf")
        self.effort = Effort(workers, codec)  # what the save that began last may take
        self._ended: Stats | None = None  # the save whose cost isn't known yet
        self._failed = False

    @property
    def plans_saves(self) -> bool:
        """Whether saves come of themselves."""
        return self._schedule is not None

    def resumed(self, step: int, epoch: int | None) -> None:
        """The run goes on from here."""
        if self._schedule is not None:
            self._schedule.begin(step, epoch)

    def step(self, *, busy: bool) -> None:
        """A step has ended; `busy`: a save was in flight in it."""
        self._meter.step(busy=busy)
        if self._meter.knows:
            self._settle()

    def is_due(self, step: int, epoch: int | None) -> bool:
        """Whether a save is due at `step`; call it once for each."""
        return any(self.due(step, epoch))

    @property
    def minds_time(self) -> bool:
        """Whether saves come by clocks, too."""
        return self._schedule is not None and self._schedule.minds_time

    def due(self, step: int, epoch: int | None) -> tuple[bool, bool]:
        """Whether a save is due at `step`, by the steps or epochs, and by time; call it once."""
        return (False, False) if self._schedule is None else self._schedule.due(step, epoch)

    def begin(self) -> None:
        """A save begins; none is in flight."""
        self._settle()
        now = self._clock()
        self._interval = float("inf") if self._begun is None else now - self._begun
        self._begun = now

        left = self._cores.left()
        fits = fitting(self._codec, self._workers, left, pressed=self._pressed)
        if self._efforts is not None:
            self.effort = self._efforts.choose(fits)
        else:
            self.effort = fits if self._pressed else self._worth.choose(fits)

    def beside(self, stats: Stats) -> contextlib.AbstractContextManager[None]:
        """Inside, in a thread of its own, a save goes on; it counts its CPU seconds in `stats`."""
        return self._cores.watched(lambda: stats.cpu_seconds + time.thread_time())

    def saved(self) -> None:
        """The caller goes on, with the save beside it."""
        if self._schedule is not None:
            self._schedule.saved()
        self._meter.restart()

    def ended(self, stats: Stats, *, failed: bool) -> None:
        """That save has ended: count what it cost, and say how much it slowed the loop down.

        If no step without a save was seen before, as soon as there was one.
        """
        self._ended, self._failed = stats, failed
        if not failed:
            fresh = stats.raw_nbytes - stats.unchanged_nbytes - stats.derived_nbytes
            self._worth.ended(self.effort, fresh, stats.written_nbytes)
        self._pressed = stats.stall_seconds + stats.background_seconds > _PRESSED * self._interval
        if self._meter.knows:
            self._settle()

    def _settle(self) -> None:
        stats, self._ended = self._ended, None
        if stats is None:
            return
        stats.slowdown_seconds = self._meter.slowdown_seconds()
        cost = stats.stall_seconds + stats.slowdown_seconds
        if self._schedule is not None:
            self._schedule.cost(cost)
        if self._efforts is not None and not self._failed:
            seconds = stats.stall_seconds + stats.background_seconds
            self._efforts.ended(self.effort, cost, seconds)
