"""Whether a step is saved: what this process finds or, with other ranks, what all agree on.

Steps and epochs are the same on every rank, so who saves by them asks nobody.
Clocks, announcements that the process is to end, and saves in flight aren't:
then all tell each other, at steps that are due and else about once a second.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from gpuckpt.errors import RankError
from gpuckpt.gathering import gather
from gpuckpt.governor import Governor
from gpuckpt.groups import Group
from gpuckpt.notice import Notice, Preempt
from gpuckpt.values import Json

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

    def __init__(self, governor: Governor, *, skips: bool = False) -> None:
        """`skips`: what is due while a save is in flight isn't saved."""
        self._governor, self._skips = governor, skips
        self.settle: Callable[[], object] = lambda: None
        """Waits until no save is in flight."""

    def is_due(self, step: int, epoch: int | None, *, busy: bool) -> bool:
        """Whether a save is due at `step`; call it once for each."""
        due = self._governor.is_due(step, epoch)
        return due and not self._is_skipped(step, busy=busy)

    def meet(self) -> None:
        """See that all ranks have been told the same."""

    def hear(self, step: int) -> None:
        """Hear what is announced to others, where a step is saved due or not."""

    def agree(self, step: int, *, saved: bool, gone: bool) -> tuple[bool, bool]:  # noqa: ARG002
        """Whether a step is saved, and whether there is no time for a last save."""
        return saved, gone

    def _is_skipped(self, step: int, *, busy: bool) -> bool:
        if busy and self._skips:
            log.info("step %d isn't saved: a step before still is", step)
        return busy and self._skips


class SharedPace(Pace):
    """The same on every rank, which all ask at the same steps."""

    def __init__(
        self,
        governor: Governor,
        group: Group,
        notice: SharedNotice,
        *,
        beside: Group | None = None,
        skips: bool,
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`skips`: what is due while a save is in flight isn't saved; all must say the same.

        The save's thread may meet the ranks at the same time, so the loop's
        meets them `beside`, or waits until the save has ended.
        """
        super().__init__(governor, skips=skips)
        self._group, self._beside, self._notice = group, beside, notice
        self._timeout, self._clock = timeout, clock
        self._watches, self._listens = governor.minds_time or notice.expected, notice.expected
        self._due_by_time = False
        self._asked: tuple[int, float] | None = None  # at which step, and when
        self._next = 0  # the step at which to ask again
        self._waited = 0.0

    def meet(self) -> None:
        """See that all ranks have been told the same; waits for them.

        Raises:
            RankError: they have different schedules.
        """
        answer = {
            "plan": [str(self._governor.every), self._skips],
            "watches": self._watches,
            "listens": self._listens,
        }
        told = gather(self._group, "options", answer, self._timeout)
        odd = [rank for rank, one in enumerate(told) if one["plan"] != told[0]["plan"]]
        if odd:
            raise RankError(
                [0, *odd],
                f"their every= or when_busy= differ ({told[0]['plan']} and "
                f"{told[odd[0]]['plan']}); give all the same",
            )
        self._watches = any(one["watches"] for one in told)
        self._listens = any(one["listens"] for one in told)

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

    def hear(self, step: int) -> None:
        """Hear what is announced to others, where a step is saved due or not; waits for them."""
        if self._listens and not self._notice.announced:
            what = f"what is announced at step {step}"
            self._hear(self._tell(what, {"notice": self._notice.own}))

    def agree(self, step: int, *, saved: bool, gone: bool) -> tuple[bool, bool]:
        """Whether a step is saved on all ranks, and whether some have no time for a last save."""
        answer = {"saved": saved, "gone": gone}
        told = self._tell(f"the last save, at step {step}", answer)
        return all(one["saved"] for one in told), any(one["gone"] for one in told)

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
        told = self._tell(f"whether step {step} is saved", answer)
        self._asked = step, self._clock()
        self._waited = self._asked[1] - now
        # Of what all have heard, so that all ask again at the same step.
        slowest = max(one["pace"] for one in told)
        seconds = max(ASK_SECONDS, told[0]["waited"] / _SHARE)
        self._next = step + max(int(seconds / slowest), 1) if slowest > 0 else step + 1
        self._hear(told)
        due = counted or bool(told[0]["due"])
        due = due and not self._is_skipped(step, busy=any(one["busy"] for one in told))
        self._due_by_time = self._due_by_time and not due
        return due

    def _tell(self, what: str, answer: Json) -> list[Any]:
        if self._beside is not None:
            return gather(self._beside, what, answer, self._timeout)
        self.settle()
        return gather(self._group, what, answer, self._timeout)

    def _hear(self, told: Sequence[Any]) -> None:
        notices = [one["notice"] for one in told if one["notice"] is not None]
        if notices:
            self._notice.hear(*min(notices, key=lambda notice: notice[1]))
