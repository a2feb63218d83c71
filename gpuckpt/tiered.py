"""The tiers of one checkpointer: what is saved to the nearest goes up to the others."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from gpuckpt.carrier import Carrier
from gpuckpt.commit import steps
from gpuckpt.convoy import Convoy
from gpuckpt.entering import Site
from gpuckpt.errors import BusyError, CheckpointError, StorageError
from gpuckpt.lane import Job
from gpuckpt.manifest import Manifest
from gpuckpt.remarks import remark
from gpuckpt.retention import NOTHING, Held
from gpuckpt.seal import Seal
from gpuckpt.sizes import parse_seconds
from gpuckpt.stores import Store
from gpuckpt.tiers import Tier
from gpuckpt.tierstats import TierStats
from gpuckpt.uploader import Uploader

log = logging.getLogger("gpuckpt")

# Of the time that is left before a kill, what an upload may take: the process has to end, too.
SHARE_BEFORE_KILL = 0.8


class Tiers:
    """The stores of a run, from the nearest up, and an `Uploader` for each but that."""

    def __init__(
        self, store: Store, higher: Sequence[Tier] = (), *, seal: Seal | None = None
    ) -> None:
        """`store` is the nearest tier's."""
        self._store, self._seal = store, seal
        self._each = [Uploader(store, tier, seal=seal) for tier in higher]
        self.damaged = False
        """Whether a file of the nearest was found damaged, and nobody has asked since."""
        self.lead = True
        """Whether it is this rank that brings steps up, for all who have the same nearest one."""
        self._carries = False

    def join(self, site: Site) -> None:
        """Before `open`: which of several ranks this one is, and whose roots are the same.

        If not all are, rank 0 says which steps go up, and each root's lead brings its files.
        """
        self.lead = site.is_lead
        if site.is_one or not self._own:
            return
        self._carries = site.rank != 0
        if self._carries:
            self._each = [
                Carrier(
                    *(self._store, replace(one.tier, store=one.store), site.run, site.rank),
                    seal=self._seal,
                )
                for one in self._each
            ]
        for one in [] if self._carries else self._each:
            one.convoy = Convoy(site.run, sorted({*site.leads} - {0}))

    @property
    def stores(self) -> list[Store]:
        """Those to restore from, the nearest first."""
        return [self._store, *(one.store for one in self._each)]

    @property
    def _own(self) -> list[Uploader]:
        return self._each if self.lead else []

    def open(self) -> None:
        """Begin to bring up what the nearest has and others lack."""
        for one in self._own:
            one.open()

    def begin(self, step: int) -> tuple[TierStats, ...]:
        """For each tier what will become of a step, as far as this rank knows."""
        stores = [self._store, *(one.store for one in self._own if not self._carries)]
        return tuple(TierStats(store.root, step) for store in stores)

    def offer(self, manifest: Manifest, stats: Sequence[TierStats]) -> None:
        """For the thread that saves: a step is durable in the nearest tier."""
        if self._carries:
            stats = [TierStats(store.root, manifest.step) for store in self.stores]
        for one, own in zip(self._own, stats[1:], strict=True):
            one.offer(Job(manifest, own))

    def held(self) -> Held:
        """What of the nearest tier's files must stay for the others."""
        found = [one.lane.held() for one in self._own]
        if not found:
            return NOTHING
        steps = frozenset[int]().union(*(one.steps for one in found))
        return Held(steps, frozenset[str]().union(*(one.segments for one in found)))

    def resumed(self, step: int, epoch: int | None) -> None:
        """The run goes on from here."""
        for one in self._own:
            one.resumed(step, epoch)

    def tell(self, on_error: str, *, stacklevel: int) -> None:
        """Tell the loop what has happened meanwhile.

        Raises:
            CheckpointError: a file of the nearest tier is damaged, with `on_error="raise"`.
        """
        found: list[str] = []
        failures: list[CheckpointError] = []
        for one in self._own:
            while one.news:
                found.append(one.news.popleft())
            while one.errors:
                failures.append(one.errors.popleft())
        self.damaged = self.damaged or bool(failures)
        if on_error != "raise":
            found += map(str, failures)
        remark(found, stacklevel=stacklevel + 1)
        if failures and on_error == "raise":
            raise failures[0]

    def complete(self, seconds: float | None, on_error: str, *, stacklevel: int) -> None:
        """Wait until every tier has what is to go up, or doesn't take it.

        Raises:
            BusyError: it goes on after so many seconds.
            StorageError: a tier can't be written to, with `on_error="raise"`;
                it will be tried again.
        """
        end = None if seconds is None else time.monotonic() + seconds
        found: list[str] = []
        for one in self._own:
            left = None if end is None else max(end - time.monotonic(), 0.0)
            if one.settle(left):
                continue
            steps = ", ".join(map(str, one.lane.steps)) or "its newest steps"
            if one.trouble is None:
                raise BusyError(f"step {steps} isn't in {one.store.root} after {seconds} s; wait")
            found.append(f"step {steps} isn't in {one.store.root} yet: {one.trouble}")
        if found and on_error == "raise":
            raise StorageError("; ".join(found))
        remark(found, stacklevel=stacklevel + 1)

    def having(self, step: int | None) -> tuple[str, ...]:
        """The roots where a step is known to be durable."""
        if step is None:
            return ()
        with contextlib.suppress(CheckpointError):
            here = [self._store.root] if step in steps(self._store) else []
            return (*here, *(one.store.root for one in self._own if one.durable == step))
        return ()

    def hurry(self, left: float) -> None:
        """Before the process is killed, in `left` seconds, bring the newest step up."""
        end = time.monotonic() + left * SHARE_BEFORE_KILL
        for one in self._own:
            one.hurry(max(end - time.monotonic(), 0.0))
        for one in self._own:
            one.settle(max(end - time.monotonic(), 0.0), tries=True)

    def close(self, seconds: float | None = None) -> None:
        """Wait for what is on its way, at most each tier's `linger`, and some `seconds`.

        The log says what isn't up then; the next run begins with that.
        """
        begun = time.monotonic()
        for one in self._own:
            most = parse_seconds(one.tier.linger)
            if seconds is not None:
                most = min(most, seconds)
            if left := one.close(max(begun + most - time.monotonic(), 0.0)):
                log.warning("%s", left)
