"""What the machines of a run do, but that of rank 0, for a tier: bring up what it calls for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from gpuckpt import layout
from gpuckpt.commit import open_step, steps
from gpuckpt.convoy import Call
from gpuckpt.errors import CheckpointError, NotFoundError
from gpuckpt.lane import Job
from gpuckpt.manifest import Manifest
from gpuckpt.seal import Seal
from gpuckpt.shipping import DamagedError, copy_files, whole_among
from gpuckpt.stores import Store, write_all
from gpuckpt.tiers import Tier
from gpuckpt.tierstats import TierStats
from gpuckpt.uploader import GivenUpError, Uploader

log = logging.getLogger("gpuckpt")

# How soon the tier is looked at again: first, and twice as late each time, up to the second.
LOOKS_SECONDS = (0.02, 5.0)
# While files are copied, so often whether they are still wanted.
WANTED_SECONDS = 1.0
# Whoever closes and has never seen rank 0 in the tier waits for it so long.
UNSEEN_SECONDS = 5.0


class Carrier(Uploader):
    """As an `Uploader`; which step goes up, and when it is there, says rank 0.

    It neither locks the tier nor deletes there, but for what it has begun itself.
    """

    def __init__(
        self,
        local: Store,
        tier: Tier,
        run: str,
        rank: int,
        *,
        seal: Seal | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`run` is the word that rank 0 calls this run's machines by; `rank` is the lead's."""
        super().__init__(local, tier, seal=seal, clock=clock)
        self._word, self._rank = run, rank
        self._newest: int | None = None  # the step that was saved last
        self._call: Call | None = None  # what is being brought
        self._pause_of_looks, self._looked = LOOKS_SECONDS[0], False
        self._seen = self._gone = self._closing = False
        self._looked_at = 0.0

    def offer(self, job: Job) -> None:
        """A step is durable in the nearest tier: rank 0 may call for it."""
        self._newest, self._looked = job.manifest.step, False
        self._pause_of_looks, self._again_at = LOOKS_SECONDS[0], 0.0
        self._wake()

    @property
    def settled(self) -> bool:
        """Whether nothing is called for; while closing, whether rank 0 has ended."""
        if self._apart.ended.is_set():
            return True
        return self._gone if self._closing else self._looked and self._call is None

    def close(self, seconds: float) -> str:
        """Wait until rank 0 has ended, at most some `seconds`, and end; what isn't up, in words."""
        if self._stopped.is_set() or not self._opened:
            return ""
        self._closing = True
        super().close(seconds if self._seen else min(seconds, UNSEEN_SECONDS))
        if self._gone or self._newest in {None, self.durable}:
            return ""
        return f"{self.store.root} may lack step {self._newest}: rank 0 hasn't said that it is done"

    def _is_time(self) -> bool:
        wanted = self._closing or self._newest is None or self._newest != self.durable
        return (wanted or not self._looked) and self._clock() >= self._again_at

    def _upload(self) -> None:
        """Look whether there is a call, and do what it says."""
        self._taken = True
        names = set(self.store.names())
        here = layout.up_name(self._word) in names
        self._seen, self._gone = self._seen or here, self._seen and not here
        self.durable = max(steps(self.store), default=None)
        call = Call.found(names, self._word, self._rank)
        if call is None:
            self._looked = True
            self._again_at = self._clock() + self._pause_of_looks
            self._pause_of_looks = min(self._pause_of_looks * 2, LOOKS_SECONDS[1])
            return
        self._call, self._looked_at = call, self._clock()
        try:
            here = self._bring(call)
            write_all(self.store, call.answer(self._rank, here=here), b"")
        finally:
            self._call = None
        self._pause_of_looks, self._again_at = LOOKS_SECONDS[0], 0.0
        self._wake()

    def _take(self, _: object) -> None:
        """Nothing is locked."""

    def _bring(self, call: Call) -> bool:
        """Copy this machine's files of a step, names durable, too; whether they are there."""
        try:
            manifest = self._opened_of(call)
        except CheckpointError as error:
            log.warning("step %d doesn't go up from %s: %s", call.step, self._local.root, error)
            return False
        job = Job(manifest, TierStats(self.store.root, call.step))
        wanted = set(manifest.files)
        self._known &= set(self.store.names())
        self._known |= whole_among(self.store, wanted - self._known)
        try:
            copy_files(
                *(self._local, self.store, manifest, self._known, job.stats),
                check=self._check,
                seal=self._seal,
                present=set(self._local.names()),
                undoes=False,  # it holds no lock: the file may be another's by now
            )
        except DamagedError as error:
            if self._is_same(call):  # else it was saved again meanwhile
                self._damaged(job, error)
            return False
        self.store.sync_names()
        return True

    def _opened_of(self, call: Call) -> Manifest:
        manifest = open_step(self._local, call.step, self._seal, parts=False)
        if Call.of(call.run, manifest) != call:
            raise NotFoundError("it was saved again meanwhile")
        return manifest

    def _is_same(self, call: Call) -> bool:
        try:
            self._opened_of(call)
        except NotFoundError:
            return False
        return True

    def _check(self) -> None:
        if self._stopped.is_set():
            raise GivenUpError
        if self._clock() - self._looked_at >= WANTED_SECONDS:
            self._looked_at = self._clock()
            if self._call is not None and self._call.name not in self.store.names():
                raise GivenUpError
