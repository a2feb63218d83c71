"""When each stage of a save began and ended, in which thread."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

# Laps of one kind that are kept of one save; of more, every second, fourth, … one.
LAPS_MAX = 512


class Span(NamedTuple):
    """A stage in one thread, from `start` to `end`, in seconds of `time.perf_counter`.

    `nbytes` are what went through it; of its time, the thread was on a CPU for
    `cpu_seconds`.
    """

    stage: str
    thread: str
    start: float
    end: float
    nbytes: int = 0
    cpu_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


class Lap:
    """A stop watch for one thread: what it did from mark to mark.

    For a batch of chunks or more, not for each tensor: a mark takes about a
    microsecond.
    """

    __slots__ = ("_cpu", "_last", "spans", "thread")

    def __init__(self) -> None:
        """It goes at once."""
        self.thread = threading.current_thread().name
        self.spans: list[Span] = []
        self._last, self._cpu = time.perf_counter(), time.thread_time()

    def mark(self, stage: str, nbytes: int = 0) -> None:
        """What the thread did since the last mark was `stage`."""
        last, cpu = self._last, self._cpu
        self._last, self._cpu = time.perf_counter(), time.thread_time()
        self.spans.append(Span(stage, self.thread, last, self._last, nbytes, self._cpu - cpu))

    @property
    def seconds(self) -> float:
        """From its beginning to its last mark."""
        return sum(span.seconds for span in self.spans)

    def seconds_of(self, *stages: str) -> float:
        """Those of some stages."""
        return sum(span.seconds for span in self.spans if span.stage in stages)

    @property
    def cpu_seconds(self) -> float:
        """Of these, on a CPU."""
        return sum(span.cpu_seconds for span in self.spans)


class Spans:
    """A save's spans, bounded in number; `add` belongs to one thread, `once` to any."""

    def __init__(self, most: int = LAPS_MAX) -> None:
        """Keep at most `most` laps of each kind that repeats."""
        self._most = most
        self._some: dict[str, _Some] = {}
        self._once: list[Lap] = []

    def add(self, lap: Lap) -> None:
        """Take note of one of many laps that begin with the same stage."""
        self._some.setdefault(lap.spans[0].stage, _Some(self._most)).add(lap)

    def once(self, lap: Lap) -> None:
        """Take note of a lap that no other is like."""
        self._once.append(lap)

    @property
    def every(self) -> int:
        """Of some kind of laps, only each so many-th was kept."""
        return max((some.every for some in self._some.values()), default=1)

    def all(self) -> list[Span]:
        """What was kept, by start."""
        laps = [*self._once, *chain.from_iterable(some.laps for some in self._some.values())]
        spans = [span for lap in laps for span in lap.spans]
        return sorted(spans, key=lambda span: (span.start, -span.end))


class _Some:
    """Each `every`-th of many laps, so that they are never more than `most`."""

    def __init__(self, most: int) -> None:
        self._most, self._seen = most, 0
        self.laps: list[Lap] = []
        self.every = 1

    def add(self, lap: Lap) -> None:
        if self._seen % self.every == 0:
            if len(self.laps) == self._most:
                self.laps = self.laps[::2]
                self.every *= 2
            if self._seen % self.every == 0:
                self.laps.append(lap)
        self._seen += 1


def pack_spans(spans: Iterable[Span]) -> dict[str, Any]:
    """Spans as JSON: names once, times in whole microseconds of the same clock."""
    stages: dict[str, int] = {}
    threads: dict[str, int] = {}
    rows = [
        [
            stages.setdefault(span.stage, len(stages)),
            threads.setdefault(span.thread, len(threads)),
            round(span.start * 1e6),
            round(span.end * 1e6),
            span.nbytes,
            round(span.cpu_seconds * 1e6),
        ]
        for span in spans
    ]
    return {"stages": list(stages), "threads": list(threads), "rows": rows}


def unpack_spans(packed: Any) -> list[Span]:
    """Spans from what `pack_spans` made of them, to the microsecond: undoes it.

    Raises:
        ValueError, TypeError, KeyError, IndexError: it isn't that.
    """
    stages, threads = _texts(packed["stages"]), _texts(packed["threads"])
    spans = []
    for stage, thread, *numbers in packed["rows"]:
        start, end, nbytes, cpu = map(_count, numbers)
        if end < start:
            raise ValueError("a span ends before it begins")
        names = stages[_count(stage)], threads[_count(thread)]
        spans.append(Span(*names, start / 1e6, end / 1e6, nbytes, cpu / 1e6))
    return spans


def _texts(found: Any) -> Sequence[str]:
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise TypeError("names are a list of texts")
    return found


def _count(number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < math.inf:
        raise ValueError(f"a number from 0 on, got {number!r}")
    return number
