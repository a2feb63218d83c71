"""Who is told of each save once it has ended, in a thread that no save waits for."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from gpuckpt.apart import Flag
from gpuckpt.errors import InvalidError
from gpuckpt.journal import Record
from gpuckpt.stats import Stats

log = logging.getLogger("gpuckpt")

# Saves that observers have yet to hear of; of more, the oldest are passed over.
WAITING_MAX = 64
# How long closing, and the interpreter's exit, wait for observers.
SETTLE_SECONDS = 5.0


@runtime_checkable
class Observer(Protocol):
    """Somebody who is told of saves: a dashboard, a log of experiments, a test."""

    def saved(self, record: Record) -> None:
        """Take note of a save that has ended: it is durable, or `record.error` says why not.

        Called in the order of the saves, by one thread at a time, none of which
        is the loop's or a save's: it may take its time.  What it raises is
        logged.  `record.stats.slowdown_seconds` is filled in at the loop's next
        step, so that of a save is known at the latest once the next has ended.
        """
        ...


class _Ended(NamedTuple):
    """A save that has ended: when, and what to add to its clock for seconds since 1970."""

    at: float
    clock: float
    stats: Stats
    failure: BaseException | None

    @property
    def record(self) -> Record:
        failure, spans = self.failure, self.stats.spans
        return Record(
            *(self.at, self.stats),
            error=None if failure is None else f"{type(failure).__name__}: {failure}",
            spans=[
                span._replace(start=span.start + self.clock, end=span.end + self.clock)
                for span in (spans.all() if spans is not None else ())
            ],
        )


class Observers:
    """Tells each observer of each save; its thread lives while there is something to tell."""

    def __init__(self, each: Sequence[Observer] = ()) -> None:
        """None of them is called yet.

        Raises:
            InvalidError: one of them is no observer.
        """
        for one in each:
            if isinstance(one, type) or not isinstance(one, Observer):
                raise InvalidError(f"an observer has a method saved(record), got {one!r}")
        self._each = tuple(each)
        self._waiting: deque[_Ended] = deque()
        self._lock = threading.Lock()
        self._idle: Flag | None = None

    def tell(self, stats: Stats, failure: BaseException | None) -> None:
        """A save has ended; for its own thread, which doesn't wait, and isn't failed by this."""
        if not self._each:
            return
        now = time.time()
        with self._lock:
            self._waiting.append(_Ended(now, now - time.perf_counter(), stats, failure))
            if len(self._waiting) > WAITING_MAX:
                missed = self._waiting.popleft().stats.step
                log.warning("observers are behind: they are not told of step %d", missed)
            if self._idle is not None:
                return
            self._idle = Flag()
        try:
            threading.Thread(target=self._run, name="gpuckpt-tell", daemon=True).start()
        except (RuntimeError, MemoryError) as error:
            log.warning("observers aren't told of step %d: %s", stats.step, error)
            self._next(over=True)

    def settle(self, seconds: float = SETTLE_SECONDS) -> None:
        """Wait until all have been told, at most so long; the log says if they haven't."""
        idle = self._idle
        if idle is not None and not idle.wait(seconds):
            log.warning("observers haven't taken note of all saves after %g s", seconds)

    def _run(self) -> None:
        while (ended := self._next()) is not None:
            for one in self._each:
                try:
                    one.saved(ended.record)
                except BaseException:  # whoever ends this thread, or a test's
                    log.exception("%s has failed to take note of step %d", one, ended.stats.step)

    def _next(self, *, over: bool = False) -> _Ended | None:
        """What is to be told next; if there is nothing, or it is all over, the thread ends."""
        with self._lock:
            if self._waiting and not over:
                return self._waiting.popleft()
            self._waiting.clear()
            idle, self._idle = self._idle, None
        if idle is not None:
            idle.set()
        return None
