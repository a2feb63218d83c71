"""`python -m bench.durability reboots [--second N] [--out FILE]`: every loss of power.

The histories of `tests/crash_histories.py`, of which the tests take samples,
whole: what a reboot finds after a loss of power before any operation, and after
a second one while a run goes on from what the first one left, or from what a kill
before any operation left unsynced; what a sync that fails leaves; and what is
found without each sync in turn, which must be damage.  Exits with 1 if anything
else is found.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import gpuckpt
from bench.machine import machine
from bench.timing import write_report
from tests.crash_checks import Checks, Failures
from tests.crash_histories import ALL, HISTORIES, Life, once, record_of
from tests.crash_store import CrashStore, Loss, Operation, losses, syncs

History = Callable[[Life], None]
Record = Sequence[Operation]


class Campaign:
    """Goes through histories, one after the other."""

    def __init__(self, second: int | None) -> None:
        """`second`: from how many first losses and kills of each a run goes on; None: from all."""
        self._second = second
        self.checks = Checks()
        self.failures: list[str] = []

    def history(self, history: History) -> dict[str, Any]:
        """How much there was to look at in one."""
        begun, record = time.monotonic(), record_of(history)
        first = list(losses(record))
        done: Counter[str] = Counter(operations=len(record), first=self._held("first", first))
        for loss in first:
            self._try("gone on", lambda: self.checks.goes_on(loss.image))  # noqa: B023 - run at once
        rng = random.Random(history.__name__)
        for loss in self._some(first, rng):
            done["second"] += self._held("second", self.checks.lost_again(loss))
            done["second_from"] += 1
        for at in self._some(range(len(record)), rng):
            done["killed"] += self._held("killed", self.checks.killed_and_lost(record, at))
            done["killed_at"] += 1
        if history in HISTORIES:
            self._syncs(history, record, done)
        seconds = round(time.monotonic() - begun, 1)
        return {"history": history.__name__, **done, "seconds": seconds}

    def _syncs(self, history: History, record: Record, done: Counter[str]) -> None:
        known = list(syncs(record))
        for at in known:
            if any(self._is_damaged(loss) for loss in losses(record, at, deaf=at)):
                done["needed_syncs"] += 1
            else:
                self.failures.append(f"{history.__name__}: nobody needs {record[at].place}")
        for failing in range(len(known)):
            life = Life(CrashStore())
            life.store.refuses = once(lambda one: one.is_sync, failing)
            with life.alive(), contextlib.suppress(gpuckpt.StorageError):
                history(life)
            done["after_a_failed_sync"] += self._held("failed", losses(life.store.record))

    def _held(self, what: str, found: Iterable[Loss]) -> int:
        count = 0
        for loss in found:
            self._try(what, lambda: self.checks.held(loss))  # noqa: B023 - run at once
            count += 1
        return count

    def _try(self, what: str, check: Callable[[], object]) -> None:
        try:
            check()
        except Failures as error:
            self.failures.append(f"{what}: {error!r}")

    def _is_damaged(self, loss: Loss) -> bool:
        try:
            self.checks.held(loss)
        except Failures:
            return True
        return False

    def _some(self, every: Sequence[Any], rng: random.Random) -> list[Any]:
        count = len(every) if self._second is None else min(self._second, len(every))
        return rng.sample(every, count)


def main(words: Sequence[str]) -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser("python -m bench.durability reboots", description=__doc__)
    parser.add_argument("--second", type=int, help="go on from so many of each history (all)")
    parser.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args(words)
    logging.disable(logging.CRITICAL)  # processes that are killed complain
    begun, campaign, rows = time.monotonic(), Campaign(options.second), []
    with tempfile.TemporaryDirectory() as name:
        where = machine(Path(name))
    for history in ALL:
        rows.append(campaign.history(history))
        print(rows[-1], flush=True)
        where["seconds"] = round(time.monotonic() - begun)
        facts = {"machine": where, "different_file_systems": campaign.checks.counts}
        if options.out:
            found = {"failures": campaign.failures, "results": rows}
            write_report(options.out, facts | found)
    print(campaign.checks.counts, campaign.failures, f"{where['seconds']} s")
    return 1 if campaign.failures else 0
