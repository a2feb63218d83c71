"""When a training loop saves."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import timedelta

from gpuckpt.errors import InvalidError
from gpuckpt.sizes import parse_seconds


@dataclass(frozen=True)
class Every:
    """When to save: whenever any of these is due.

    `steps=300, after=100` saves at steps 400, 700, 1000, … (SINGA's
    `checkpoint_frequency` and `checkpoint_after`).  `epochs=2` saves when a
    second, fourth, … epoch begins or is first told of (Fluid's
    `epoch_interval`).  `seconds` is a time on the clock since the last save, a
    number or a text like `"10 min"`.  `overhead=0.01` saves as often as keeps
    the measured cost of saving (the stall, and the slow-down of the
    steps beside the save) under that share of the time: what a save has cost
    is made up for before the next.  Saves also take as many threads, and with
    `codec="auto"` compress as much, as lets them come most often.  A loop that
    counts in strides saves at the first step at or past one that is due.
    """

    steps: int | None = None
    after: int = 0
    epochs: int | None = None
    seconds: float | str | timedelta | None = None
    overhead: float | None = None

    def __post_init__(self) -> None:
        if all(getattr(self, f.name) is None for f in fields(self) if f.name != "after"):
            raise InvalidError("Every needs at least one of steps, epochs, seconds, overhead")
        for name in ("steps", "epochs"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InvalidError(f"Every: {name} is a positive integer, got {value!r}")
        if self.after < 0:
            raise InvalidError(f"Every: after can't be negative, got {self.after}")
        if self.overhead is not None and not 0 < self.overhead < 1:
            raise InvalidError(f"Every: overhead is between 0 and 1, got {self.overhead}")
        if self.seconds is not None:
            parse_seconds(self.seconds)


class Schedule:
    """An `Every` that watches a run."""

    def __init__(self, every: Every, clock: Callable[[], float] = time.monotonic) -> None:
        self._every, self._clock = every, clock
        self._step: int | None = None
        self._epoch: int | None = None
        self._saved_at = clock()
        self._debt: float | None = None  # cost that no time has made up for yet, in seconds
        self._measuring = False

    def begin(self, step: int, epoch: int | None) -> None:
        """Take up a run that has come as far as `step` of `epoch`."""
        self._step, self._epoch = step, epoch

    @property
    def minds_time(self) -> bool:
        """Whether it goes by clocks, too."""
        return self._every.seconds is not None or self._every.overhead is not None

    def due(self, step: int, epoch: int | None) -> tuple[bool, bool]:
        """Whether a save is due at `step`, by the steps or epochs, and by time; call it once."""
        counted = self._steps_due(step) or self._epochs_due(epoch)
        self._step = step
        self._epoch = epoch if epoch is not None else self._epoch
        return counted, self._time_due()

    def is_due(self, step: int, epoch: int | None) -> bool:
        """Whether a save is due at `step`; call it once for each."""
        return any(self.due(step, epoch))

    def saved(self) -> None:
        """Note that a save begins."""
        now = self._clock()
        if self._debt is not None:
            paid = (self._every.overhead or 1.0) * (now - self._saved_at)
            self._debt = max(self._debt - paid, 0.0)
        self._saved_at, self._measuring = now, True

    def cost(self, seconds: float) -> None:
        """Note what that save, which has ended, cost the run."""
        self._debt, self._measuring = (self._debt or 0.0) + seconds, False

    def _steps_due(self, step: int) -> bool:
        if self._every.steps is None:
            return False
        before = step - 1 if self._step is None else self._step
        return self._count(step) > max(self._count(before), 0)

    def _count(self, step: int) -> int:
        assert self._every.steps is not None
        return (step - self._every.after) // self._every.steps

    def _epochs_due(self, epoch: int | None) -> bool:
        if self._every.epochs is None or epoch is None:
            return False
        before = epoch - 1 if self._epoch is None else self._epoch
        return epoch // self._every.epochs > max(before // self._every.epochs, 0)

    def _time_due(self) -> bool:
        elapsed = self._clock() - self._saved_at
        if self._every.seconds is not None and elapsed >= parse_seconds(self._every.seconds):
            return True
        if self._every.overhead is None or self._measuring:
            return False
        # Nothing is known before the first save, so that comes at once.
        return self._debt is None or self._debt <= self._every.overhead * elapsed
