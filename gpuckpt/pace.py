"""Whether a step is saved: what this process finds or, with other ranks, what all agree on.

Steps and epochs are the same on every rank, so who saves by them asks nobody.
Clocks, announcements that the process is to end, and saves in flight aren't:
then all tell each other, at steps that are due and else about once a second.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import timedelta

from gpuckpt.gathering import gather
from gpuckpt.governor import Governor
from gpuckpt.groups import Group
from gpuckpt.notice import Notice, Preempt

log = logging.getLogger("gpuckpt")

# Ranks ask each other so often, or as seldom as makes asking a hundredth of the time.
ASK_SECONDS = 1.0
_SHARE = 0.01


class SharedNotice(Notice):
    """Announcements that count once every rank has heard of them."""

    def __init__(
        self,
        preempt: Preempt,
        grace: float | str | timedelta,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """As of `Notice`."""
        super().__init__(preempt, grace, clock)
        self._heard: tuple[str, float] | None = None

    @property
    def announced(self) -> bool:
        """Whether every rank has heard of one."""
        return self._heard is not None

    @property
    def own(self) -> tuple[str, float] | None:
        """Who has told this process, and the seconds that are left."""
        if not super().announced:
            return None
        by, until = super()._earliest()
        return by, until - self._clock()

    def hear(self, by: str, left: float) -> None:
        """Take note of the earliest that any rank has heard."""
        if self._heard is None:
            self._heard = by, self._clock() + left

    def _earliest(self) -> tuple[str, float]:
        assert self._heard is not None
        return self._heard


class Pace:
    """Says of each step whether it is to be saved."""

    def __init__(self, governor: Governor) -> None:
        self._governor = governor

    def is_due(self, step: int, epoch: int | None, *, busy: bool) -> bool:  # noqa: ARG002
        """Whether a save is due at `step`; call it once for each."""
        return self._governor.is_due(step, epoch)

    def all_give_up(self, step: int, gone: bool) -> bool:  # noqa: ARG002, FBT001
        """Whether there is no time for a last save."""
        return gone


class SharedPace(Pace):
    """The same on every rank, which all ask at the same steps."""

    def __init__(
        self,
        governor: Governor,
        group: Group,
        notice: SharedNotice,
        *,
        skips: bool,
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`skips`: what is due while a save is in flight isn't saved; all must say the same."""
        super().__init__(governor)
        self._group, self._notice, self._skips = group, notice, skips
        self._timeout, self._clock = timeout, clock
        self._watches = governor.minds_time or notice.expected
        self._due_by_time = False
        self._asked: tuple[int, float] | None = None  # at which step, and when
        self._next = 0  # the step at which to ask again
        self._waited = 0.0

    def is_due(self, step: int, epoch: int | None, *, busy: bool) -> bool:
        """Whether a save is due at `step` on every rank; may wait for the others.

        Raises:
            RankError: some ranks aren't at this step.
        """
        counted, by_time = self._governor.due(step, epoch)
        self._due_by_time = self._due_by_time or by_time
        asks = self._watches and (counted or step >= self._next)
        if not asks and not (self._skips and counted):
            return counted
        return self._ask(step, counted=counted, busy=busy)

    def all_give_up(self, step: int, gone: bool) -> bool:  # noqa: FBT001
        """Whether there is no time for a last save on some rank."""
        return any(gather(self._group, f"the last save, at step {step}", gone, self._timeout))

    def _ask(self, step: int, *, counted: bool, busy: bool) -> bool:
        now = self._clock()
        before, at = self._asked or (step - 1, now)
        answer = {
            "due": self._due_by_time,
            "busy": busy,
            "notice": self._notice.own,
            "pace": (now - at) / max(step - before, 1),
            "waited": self._waited,
        }
        told = gather(self._group, f"whether step {step} is saved", answer, self._timeout)
        self._asked = step, self._clock()
        self._waited = self._asked[1] - now
        # Of what all have heard, so that all ask again at the same step.
        slowest = max(one["pace"] for one in told)
        seconds = max(ASK_SECONDS, told[0]["waited"] / _SHARE)
        self._next = step + max(int(seconds / slowest), 1) if slowest > 0 else step + 1
        notices = [one["notice"] for one in told if one["notice"] is not None]
        if notices:
            self._notice.hear(*min(notices, key=lambda notice: notice[1]))
        due = counted or bool(told[0]["due"])
        if due and self._skips and any(one["busy"] for one in told):
            log.info("step %d isn't saved: a step before still is", step)
            due = False
        self._due_by_time = self._due_by_time and not due
        return due
