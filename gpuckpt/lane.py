"""The way up to one tier: one step is on it, and one waits."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from gpuckpt.manifest import Manifest
from gpuckpt.retention import Held
from gpuckpt.tierstats import TierStats

log = logging.getLogger("gpuckpt")


@dataclass(frozen=True, slots=True)
class Job:
    """A committed step of the nearest tier that is to go up."""

    manifest: Manifest
    stats: TierStats


Jobs = tuple[Job | None, Job | None]


class Lane:
    """Of steps that are offered faster than they go up, the newest waits; others are passed over.

    Its methods are for threads that no signal reaches; the loop's only looks
    at `jobs` and `latest`, which are replaced as a whole.
    """

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self.jobs: Jobs = (None, None)
        """What is on its way, and what waits."""
        self.latest: Job | None = None
        """What was offered last, whether or not it is to go up."""

    @property
    def steps(self) -> list[int]:
        """What is on its way or waits."""
        return [job.manifest.step for job in self.jobs if job is not None]

    def offer(self, job: Job, *, due: bool = True) -> None:
        """Take note of the newest step; it waits, if it is due."""
        with self._changing:
            self.latest = job
            if due:
                self._queue(job)
            else:
                job.stats.finish("left out")

    def offer_first(self, job: Job) -> None:
        """As `offer`, unless there was one before."""
        with self._changing:
            if self.latest is None:
                self.latest = job
                self._queue(job)

    def offer_again(self) -> None:
        """If the newest was left out, it shall go up all the same."""
        with self._changing:
            if self.latest is not None and self.latest.stats.outcome == "left out":
                stats = TierStats(self.latest.stats.root, self.latest.stats.step)
                self.latest = Job(self.latest.manifest, stats)
                self._queue(self.latest)

    def give_up(self, job: Job) -> bool:
        """It can't go up; whether it was the newest, so that another may be offered first."""
        with self._changing:
            if self.latest is not job:
                return False
            self.latest = None
        return True

    def take(self) -> Job | None:
        """What waits is on its way now."""
        with self._changing:
            job = self.jobs[1]
            self.jobs = (job, None)
        return job

    def let_go(self) -> None:
        """What was on its way isn't any more."""
        with self._changing:
            self.jobs = (None, self.jobs[1])

    def put_back(self) -> None:
        """What was on its way waits again, unless a newer one does."""
        with self._changing:
            job, waiting = self.jobs
            self.jobs = (None, waiting or job)
            if job is not None and waiting is not None:
                _pass_over(job)

    def clear(self, error: BaseException) -> None:
        """Nothing goes up any more."""
        jobs, self.jobs = self.jobs, (None, None)
        for job in jobs:
            if job is not None:
                job.stats.finish("failed", error)

    def held(self) -> Held:
        """What must stay in the nearest tier for it."""
        with self._changing:
            found = [job.manifest for job in self.jobs if job is not None]
        names = frozenset(name for manifest in found for name in manifest.files)
        return Held(frozenset(manifest.step for manifest in found), names)

    def _queue(self, job: Job) -> None:
        on_its_way, waiting = self.jobs
        self.jobs = (on_its_way, job)
        if waiting is not None:
            _pass_over(waiting)


def _pass_over(job: Job) -> None:
    log.info("step %d doesn't go up to %s: a newer one does", job.stats.step, job.stats.root)
    job.stats.finish("passed over")
