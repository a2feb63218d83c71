"""The last save of a run that is told to end: what to save, how, and whether there is time.

1. Wait for a save in flight.    It is under way; unless it comes too late and a new one doesn't.
2. Save the state as it is now.  By the way that was in time, as far as saves before have shown.
3. Wait until that is durable.   Then the loop may end, with an exit code that says why.

If the first has used up the time for the second, the run ends with the first:
it is only a little older, and a process that ends by itself can still say why.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from gpuckpt.deadline import choose, turn
from gpuckpt.notice import Notice
from gpuckpt.pace import Pace
from gpuckpt.pending import Pending
from gpuckpt.save import Header
from gpuckpt.saving import Saves
from gpuckpt.spans import Lap
from gpuckpt.tiered import SHARE_BEFORE_KILL

log = logging.getLogger("gpuckpt")

R = TypeVar("R")

# EX_TEMPFAIL of sysexits.h: not done, and worth another try.
PREEMPTED = 75
# How often a save in flight is looked at while it is waited for.
_LOOK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Preemption:
    """How a run that was told to end came to its end.

    `by` is the signal's name, or that of the function that announced it;
    `step` the step at which the run stops, and `saved` whether that is durable.
    `newest` is the step that the run goes on from next time: `step`, or an
    earlier one if there was no time; None if this run knows of none.
    `left_seconds` is what was left of the grace period then, less than nothing
    if it was over.  `tiers` are the roots where `newest` is known to be durable.
    """

    by: str
    step: int
    saved: bool
    newest: int | None
    left_seconds: float
    tiers: tuple[str, ...] = ()


class LastSave:
    """Makes the last save of a run, once its end was announced."""

    def __init__(self, notice: Notice, saves: Saves, pace: Pace) -> None:
        """`saves` are those of the checkpointer."""
        self._pace = pace
        pace.settle = saves.settle
        self._notice, self._saves = notice, saves
        self._handlers = contextlib.ExitStack()
        self.outcome: Preemption | None = None
        if notice.expected:
            saves.recall()

    def open(self) -> None:
        """Have the handlers of signals in place until `close`: both in the main thread.

        Raises:
            InvalidError: a signal can't be caught.
        """
        self._handlers.enter_context(self._notice.watched())

    def is_due(self) -> bool:
        """Whether the run's end was announced and its state not seen to yet."""
        return self._notice.announced and self.outcome is None

    def ask(self) -> None:
        """Ask whether the run is to end, where that isn't told by a signal."""
        if self.outcome is None:
            self._notice.ask()

    def save(self, header: Header, state: Any, *, anyway: bool) -> Pending | None:
        """Save the state in the background; once the run's end is announced, until it is durable.

        The announcement may come at any moment, also while the save before is
        waited for.  After it, None, unless it is to be saved `anyway`, if that
        step is durable already or there was only time for the save in flight.

        Raises:
            CheckpointError: it failed, or before an announcement the one before
                did, and failures are to be raised.
        """
        lap = Lap()
        save = self._saves.save
        if save is not None and self._notice.expected and self.outcome is None:
            while not (self.is_due() or save.ends_within(_LOOK_SECONDS)):
                pass
        if self.is_due():
            make = partial(self._make, header, state, lap, anyway=anyway)
            return self._concluded(header.step, make)
        pending = self._saves.begin(header, state, lap=lap)
        if self.is_due():
            self._concluded(header.step, partial(self._see_through, pending))
        return pending

    def most_seconds(self, seconds: float | None) -> float | None:
        """How long uploads may be waited for: `seconds`, and less if the process is to end."""
        if not self._notice.announced:
            return seconds
        left = max(self._notice.left, 0.0) * SHARE_BEFORE_KILL
        return left if seconds is None else min(left, seconds)

    def close(self) -> None:
        """Put the handlers back; say so if the end was announced only after the last step."""
        self._handlers.close()
        if self.is_due():
            log.warning("%s came after the last step; nothing was saved for it", self._notice.by)

    def _make(self, header: Header, state: Any, lap: Lap, *, anyway: bool) -> Pending | None:
        log.warning(
            "%s: the process is to end in %.1f s, the run at step %d",
            *(self._notice.by, self._notice.left, header.step),
        )
        finished = self._settle(header.step)
        left = self._notice.left
        way = choose(self._saves.ways(), left)
        late = way.seconds is not None and way.seconds > left
        saved, gone = self._pace.agree(
            header.step,
            saved=self._saves.committed == header.step,
            gone=finished and late and not anyway,
        )
        if saved and not anyway:
            return None
        log.log(
            logging.WARNING if late else logging.INFO,
            "step %d %s saved: with codec=%r that takes %s s, and %.1f s are left%s",
            *(header.step, "isn't" if gone else "is", way.codec),
            "nobody knows how many" if way.seconds is None else f"{way.seconds:.1f}",
            *(left, "; it is tried all the same" if late and not gone else ""),
        )
        if gone:
            return None
        return self._see_through(self._saves.begin(header, state, lap=lap, way=way, left=left))

    def _settle(self, step: int) -> bool:
        """Wait for a save in flight, or give it up; whether there was one, and it has committed."""
        save = self._saves.save
        if save is None:
            return False
        over = save.pending.committed.is_set()
        while not save.ends_within(_LOOK_SECONDS):
            if save.pending.step == step or save.pending.committed.is_set():
                continue
            left, in_flight = self._notice.left, self._saves.remaining_seconds()
            if turn(left, in_flight, choose(self._saves.ways(), left).seconds) == "give up":
                log.warning("the save of step %d gives way to step %d", save.pending.step, step)
                save.give_up()
        # An older one's failure must not keep this one from being saved.
        self._saves.reap(wait=True, on_error="warn")
        return save.pending.failure is None and not over

    def _see_through(self, pending: Pending) -> Pending:
        """Wait until it is durable; what went wrong is raised, if it is to be."""
        pending.committed.wait()
        if pending.failure is not None:
            self._saves.reap(wait=True)
        else:
            self._saves.committed = pending.step
        return pending

    def _concluded(self, step: int, do: Callable[[], R]) -> R:
        """Do that; the run may end afterwards, also if it fails."""
        try:
            done = do()
        except Exception:
            self._conclude(step)
            raise
        self._conclude(step)
        return done

    def _conclude(self, step: int) -> None:
        saved, left = self._saves.committed == step, self._notice.left
        before = self._saves.previous
        newest = before.step if before is not None else None
        tiers = self._saves.tiers
        here = tiers.having(newest)
        self.outcome = Preemption(self._notice.by, step, saved, newest, left, here)
        if newest is not None and len(tiers.stores) > 1:
            # The machine's disk may go with it.
            if self._saves.save is not None:
                self._saves.save.ends_within(max(left, 0.0) * SHARE_BEFORE_KILL)
            tiers.hurry(self._notice.left)
            self.outcome = replace(
                self.outcome, tiers=tiers.having(newest), left_seconds=self._notice.left
            )
        if saved:
            log.info("step %d is durable, with %.1f s left; the run may end", step, left)
        else:
            log.warning(
                "step %d was not saved, with %.1f s left; the run goes on from step %s next time",
                *(step, left, newest),
            )
