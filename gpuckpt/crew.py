"""The ranks of a checkpointer: what it does with the others, or alone."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta

from gpuckpt.commit import writing
from gpuckpt.concord import Concord
from gpuckpt.cutting import Reshard
from gpuckpt.entering import entered
from gpuckpt.errors import InvalidError
from gpuckpt.governor import Governor
from gpuckpt.groups import Group
from gpuckpt.groups.detect import as_group
from gpuckpt.groups.meeting import Meeting
from gpuckpt.joint import Joint
from gpuckpt.notice import Notice, Preempt
from gpuckpt.pace import Pace, SharedNotice, SharedPace
from gpuckpt.retention import Keep
from gpuckpt.seal import Seal
from gpuckpt.sizes import parse_seconds
from gpuckpt.spares import Spares
from gpuckpt.stores import Store
from gpuckpt.tiered import Tiers


class Crew:
    """A group, unless it is of one, and how long its ranks wait for each other."""

    def __init__(self, group: Group | None, timeout: float | str | timedelta) -> None:
        """`timeout` is the most that a rank waits at a time; seconds, or a text like "10 min"."""
        self._group = group if group is not None and group.size > 1 else None
        self._timeout = parse_seconds(timeout)
        self._joint: Joint | None = None
        self._spares: Spares | None = None
        self._pace: Pace | None = None

    @classmethod
    def of(cls, group: object, timeout: float | str | timedelta, store: Store) -> Crew:
        """Those that a user means by `group`, or that the program and its launcher tell of.

        Raises:
            InvalidError: `group` means nothing.
        """
        found = as_group(group, store=store, environment=os.environ, modules=sys.modules)
        return cls(found, timeout)

    @property
    def rank(self) -> int:
        """This rank's number; 0 if there is one."""
        return 0 if self._group is None else self._group.rank

    def joint(
        self,
        store: Store,
        keep: Keep | None,
        seal: Seal | None,
        tiers: Tiers,
        reshard: Reshard = "any",
    ) -> Joint | None:
        """How they save; None if there is one."""
        if self._group is not None:
            self._tiers = tiers
            self._joint = Joint(
                *(self._group, store),
                keep=keep,
                seal=seal,
                held=tiers.held,
                timeout=self._timeout,
                reshard=reshard,
                prompt=self._spares is not None,
            )
        return self._joint

    def concord(self) -> Concord | None:
        """How they restore; None if there is one."""
        if self._group is None:
            return None
        return Concord(self._group, self._timeout, self._spares)

    def spare(self, store: Store, replicas: int) -> Spares | None:
        """Copies on other machines; None if there are none.

        Raises:
            InvalidError: more than one copy is wanted, or of a root that isn't a local disk.
        """
        if replicas not in (0, 1):
            raise InvalidError(f"replicas is 0 or 1, got {replicas!r}")
        if self._group is not None and replicas:
            self._spares = Spares(self._group, store)
        return self._spares

    def pace(
        self,
        governor: Governor,
        preempt: Preempt,
        grace: float | str | timedelta,
        *,
        skips: bool,
    ) -> tuple[Notice, Pace]:
        """How they agree whether a step is saved, and on announcements of the end."""
        if self._group is None:
            return Notice(preempt, grace), Pace(governor, skips=skips)
        notice = SharedNotice(preempt, grace)
        timeout = self._timeout
        self._pace = SharedPace(
            *(governor, self._group, notice),
            beside=getattr(self._group, "beside", lambda _: None)("pace"),
            skips=skips,
            timeout=timeout,
        )
        return notice, self._pace

    def leave(self, *, leaving: bool) -> None:
        """Don't wait for other ranks, or wait for them again, if the group lets one leave."""
        getattr(self._group, "leave", lambda **_: None)(leaving=leaving)

    @contextlib.contextmanager
    def entered(self, store: Store) -> Iterator[None]:
        """Have the root for writing until the end of the block."""
        if self._group is None or self._joint is None:
            with writing(store):
                yield
            return
        with entered(store, self._group, self._timeout) as self._joint.site:
            self._tiers.join(self._joint.site)
            if self._pace is not None:
                self._pace.meet()
            with self._spares.kept() if self._spares else contextlib.nullcontext():
                yield
        # What the last round came to may have to be read from this process.
        if isinstance(self._group, Meeting):
            self._group.close()
