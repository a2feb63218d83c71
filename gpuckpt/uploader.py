"""Steps go up to one tier, the newest that waits first, in a thread that nobody waits for.

At most one is on its way and one waits: what a newer one finds waiting is
passed over.  These two are held in the nearest tier until they are up, so a
slow tier costs so much room and no more.  Whatever fails is tried again,
later each time; damage of what is to be copied isn't.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable

from gpuckpt.apart import Apart, Flag
from gpuckpt.commit import named_files, open_step, steps, writing
from gpuckpt.convoy import Convoy, LackingError
from gpuckpt.errors import BusyError, CheckpointError, ClosedError, CorruptError
from gpuckpt.lane import Job, Lane
from gpuckpt.manifest import Manifest
from gpuckpt.retention import prune_quietly
from gpuckpt.schedule import Every, Schedule
from gpuckpt.seal import Seal
from gpuckpt.shipping import DamagedError, copy_step, missing_nbytes, whole_segments
from gpuckpt.stores import Store
from gpuckpt.tiers import Tier
from gpuckpt.tierstats import TierStats

log = logging.getLogger("gpuckpt")

# What has failed is tried again after the first, then twice as long each time, up to the second.
PAUSES_SECONDS = (1.0, 60.0)
# How long one that is told to stop is waited for: it looks before each part that it copies.
WIND_DOWN_SECONDS = 5.0
_LOOK_SECONDS, _IDLE_SECONDS = 0.02, 1.0


class GivenUpError(Exception):
    """What was on its way is to stop."""


class Uploader:
    """One tier, the lock of which it holds from when it can be had until `close`.

    The thread that saves calls `offer`, that of the loop all else.
    """

    def __init__(
        self,
        local: Store,
        tier: Tier,
        *,
        seal: Seal | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`local` is the nearest tier's store; nothing is reached before `open`."""
        self.store, self._local, self.tier = tier.open(), local, tier
        self._seal, self._clock = seal, clock
        self.convoy: Convoy | None = None
        """The machines that have files of the steps, too, if there are any; set before `open`."""
        self._schedule = Schedule(tier.every, clock) if isinstance(tier.every, Every) else None
        self.lane = Lane()
        self._known: set[str] = set()
        self._opened = self._taken = self._gives_way = self._wants_latest = False
        self._pause = self._again_at = 0.0
        self._trouble: BaseException | None = None
        self._failures = 0
        self._rate = 0.0  # bytes a second, of what went up last
        self.durable: int | None = None
        """The step that is known to be the last that became durable there."""
        self.news: deque[str] = deque()
        self.errors: deque[CheckpointError] = deque()
        """What isn't tried again."""
        self._stopped = Flag()
        self._wake_up = _thread.allocate_lock()
        self._wake_up.acquire()
        self._apart = Apart(self._run, self._died, daemon=True)

    def open(self) -> None:
        """Begin; the newest step goes up, if the tier has none as new."""
        self._opened = True
        self._apart.start()

    def resumed(self, step: int, epoch: int | None) -> None:
        """The run goes on from here."""
        if self._schedule is not None:
            self._schedule.begin(step, epoch)

    def offer(self, job: Job) -> None:
        """A step is durable in the nearest tier: let it go up, if it is to."""
        manifest = job.manifest
        if self._apart.ended.is_set():
            job.stats.finish("failed", ClosedError("nothing goes up any more"))
            return
        due = self._is_due(manifest)
        self.lane.offer(job, due=due)
        if due and self._schedule is not None:
            self._schedule.saved()
        self._wake()

    @property
    def settled(self) -> bool:
        """Whether nothing is on its way nor waits."""
        if self._apart.ended.is_set():
            return True
        return self._taken and not self._wants_latest and self.lane.jobs == (None, None)

    @property
    def trouble(self) -> BaseException | None:
        """What the last try met, if it has failed."""
        return self._trouble

    def settle(self, seconds: float | None, *, tries: bool = False) -> bool:
        """Wait until all is up, at most some `seconds`; whether it is.

        What waits to be tried again is tried now.  Returns at the first
        failure, too, unless with `tries`.
        """
        end = None if seconds is None else self._clock() + seconds
        failures, self._again_at = self._failures, 0.0
        self._wake()
        while not self.settled:
            if self._failures > failures and not tries:
                return False
            if end is not None and self._clock() >= end:
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def hurry(self, left: float) -> None:
        """The process is to end in so many seconds: the newest step shall be up, also undue.

        One that is on its way gives way to it, if there is no time for both.
        """
        self._wants_latest = True
        flying, latest = self.lane.jobs[0], self.lane.latest
        if flying is not None and latest is not None and flying is not latest:
            # Not the exact bytes: the one on its way goes on adding to what is known.
            with contextlib.suppress(CheckpointError, RuntimeError):
                known = set(self._known)
                both = (flying.manifest, latest.manifest)
                wanted = sum(missing_nbytes(self._local, one, known) for one in both)
                wanted -= flying.stats.nbytes
                self._gives_way = self._rate <= 0 or wanted > left * self._rate
        self._again_at = 0.0
        self._wake()

    def close(self, seconds: float) -> str:
        """Wait for what is on its way, at most some `seconds`, then end; what isn't up, in words.

        If the last try has failed, there is one more, and no others.
        """
        if self._stopped.is_set() or not self._opened:
            return ""
        self._apart.cancel_unless_begun()
        self.settle(seconds, tries=self._trouble is None)
        self._stopped.set()
        self._wake()
        if not self._apart.ended.wait(WIND_DOWN_SECONDS):
            self._say(f"{self.store.root}: its storage doesn't answer; it stays locked")
        left = self.lane.steps
        why = self._trouble or BusyError(f"it wasn't up after {seconds:.1f} s")
        self.lane.clear(why)
        if not left:
            return ""
        return f"{self.store.root} lacks steps {left}, which {self._local.root} has: {why}"

    def _run(self) -> None:
        with contextlib.ExitStack() as held:
            while not self._stopped.is_set():
                if self._is_time():
                    self._try(held)
                if self._is_time():
                    continue
                left = self._again_at - self._clock()
                self._wake_up.acquire(timeout=left if 0 < left < _IDLE_SECONDS else _IDLE_SECONDS)

    def _is_time(self) -> bool:
        wanted = not self._taken or self._wants_latest or self.lane.jobs[1] is not None
        return wanted and self._clock() >= self._again_at

    def _try(self, held: contextlib.ExitStack) -> None:
        try:
            if not self._taken:
                self._take(held)
            self._look_for_latest()
            self._upload()
        except GivenUpError:
            self._put_back()
            self._wake()
        except Exception as error:
            self._put_back()
            self._postpone(error)
        else:
            if self._trouble is not None:
                self._say(f"{self.store.root} is back, and has step {self.durable}")
            self._trouble, self._pause = None, 0.0
            self._let_go()

    def _take(self, held: contextlib.ExitStack) -> None:
        """Lock the tier, sweep it, and see what it has."""
        with contextlib.ExitStack() as opened:
            opened.enter_context(writing(self.store))
            self._known = whole_segments(self.store)
            there = steps(self.store)
            self.durable = there[-1] if there else None
            self._catch_up()
            if self.convoy is not None:
                opened.enter_context(self.convoy.led(self.store))
            held.enter_context(opened.pop_all())
        self._taken = True

    def _catch_up(self, below: float = math.inf) -> None:
        """What a run before has left behind goes up: the newest, below the one that couldn't."""
        try:
            manifest = self._left_behind(below)
        except CheckpointError as error:
            log.warning("nothing goes up to %s yet: %s", self.store.root, error)
            return
        if manifest is not None and self._is_due(manifest):
            self.lane.offer_first(Job(manifest, TierStats(self.store.root, manifest.step)))

    def _left_behind(self, below: float) -> Manifest | None:
        """The newest step here that isn't there, and may be had whole."""
        names, newest = set(self._local.names()), self.durable
        for step in reversed([one for one in steps(self._local) if one < below]):
            if newest is not None and newest > step:
                return None
            manifest = open_step(self._local, step, self._seal, parts=False)
            if newest == step:
                with contextlib.suppress(CheckpointError):
                    if named_files(self.store, step) == manifest.files:
                        return None
            if self.convoy is not None or {part.name for part in manifest.parts} <= names:
                return manifest
            log.warning("step %d doesn't go up: parts of it are on other machines", step)
        return None

    def _is_due(self, manifest: Manifest) -> bool:
        schedule = self._schedule
        return schedule is None or schedule.is_due(manifest.step, manifest.epoch)

    def _upload(self) -> None:
        job = self.lane.take()
        if job is None:
            return
        begun, before = self._clock(), job.stats.nbytes
        job.stats.tries += 1
        try:
            self._known &= set(self.store.names())
            copy = copy_step if self.convoy is None else self.convoy.copy_step
            copy(
                *(self._local, self.store, job.manifest, self._known, job.stats),
                check=self._check,
                seal=self._seal,
            )
        except DamagedError as error:
            self._damaged(job, error)
            return
        except LackingError as error:
            self._lacking(job, error)
            return
        finally:
            took = self._clock() - begun
            job.stats.seconds += took
            self._rate = (job.stats.nbytes - before) / took if took > 0 else 0.0
        self.durable = job.manifest.step
        job.stats.finish("durable")
        log.info("step %d is durable in %s", self.durable, self.store.root)
        prune_quietly(self.store, self.tier.keep, job.manifest, self._seal)

    def _damaged(self, job: Job, error: DamagedError) -> None:
        failure = CorruptError(
            f"{self._local.root}, step {job.manifest.step}",
            f"it doesn't go up to {self.store.root}, so that damage isn't spread ({error})",
            remedy="the next save writes everything anew, and goes up",
        )
        failure.__cause__ = error
        log.warning("%s", failure)
        job.stats.finish("failed", error)
        self.errors.append(failure)

    def _lacking(self, job: Job, error: LackingError) -> None:
        """It can't go up; an older one may, that a run before has left behind."""
        self._say(f"step {job.manifest.step} doesn't go up to {self.store.root}: {error}")
        job.stats.finish("failed", error)
        if self.lane.give_up(job):
            self._catch_up(job.manifest.step)
            self._wake()

    def _let_go(self) -> None:
        self.lane.let_go()
        self._gives_way = False

    def _put_back(self) -> None:
        self.lane.put_back()
        self._gives_way = False

    def _postpone(self, error: Exception) -> None:
        least, most = PAUSES_SECONDS
        self._pause = min(max(self._pause * 2, least), most)
        self._again_at = self._clock() + self._pause * random.uniform(0.5, 1.0)  # noqa: S311
        if self._trouble is None:
            self._say(
                f"{self.store.root} can't be written to: {error}; the run goes on, its steps are "
                f"in {self._local.root}, and it is tried again until it works"
            )
            if not isinstance(error, CheckpointError):
                log.error("this isn't an error of the storage's", exc_info=error)
        self._trouble = error
        self._failures += 1

    def _look_for_latest(self) -> None:
        """If the process is to end, what was left out isn't any more."""
        if self._wants_latest:
            self.lane.offer_again()
            self._wants_latest = False

    def _check(self) -> None:
        self._look_for_latest()
        if self._stopped.is_set() or (self._gives_way and self.lane.jobs[1] is not None):
            raise GivenUpError

    def _died(self, error: BaseException) -> None:
        """Whatever has ended the thread: nobody waits for it, and nothing is held for it."""
        self._trouble = error
        self.lane.clear(error)
        self._say(f"nothing goes up to {self.store.root} any more: {error!r}")

    def _say(self, sentence: str) -> None:
        log.warning("%s", sentence)
        self.news.append(sentence)

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._wake_up.release()
