"""How much of the machine a save takes: chosen by the cores left over, or by what saves cost."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

AUTO, RAW = "auto", "raw"
# An encoder takes a core, and what a save does besides a part of one: else it takes the loop's.
_ENOUGH_CORES = 1.25
# Of a single core this share is enough.
_ENOUGH_SHARE = 0.75
# A few costs of each, of which the median counts: what disturbs one save isn't learnt.
_REMEMBERED = 3
# What is this much dearer than the best is as good, and the one with fewer bytes is taken.
_AS_GOOD = 1.1
# One that is as dear as the best is tried anew after so many saves, one that is twice as dear
# after twice as many: so trying costs little, whatever it costs.
_TRIED_EVERY = 16
# Less than this share of the bytes isn't worth the time that it may cost.
_WORTH_SHARE = 0.06
# A save of fewer bytes says little of the disk, and takes little time.
_TELLING_NBYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Effort:
    """So many threads that encode, and by which codec."""

    workers: int
    codec: str


def efforts_of(codec: str, workers: int) -> tuple[Effort, ...]:
    """What there is to choose from, from the fewest bytes and seconds to the least work.

    A codec that was asked for stays; `auto` may be `raw`.
    """
    many = [Effort(workers, codec), Effort(1, codec)]
    few = [Effort(1, RAW)] if codec == AUTO else []
    return tuple(dict.fromkeys(many + few))


def fitting(codec: str, workers: int, left: float | None, *, pressed: bool) -> Effort:
    """What suits a loop that leaves over so many cores, if nothing is known of costs.

    `auto` has a thread for each core that is left over; with less than one and
    a quarter, chunks stay as they are, which takes the fewest CPU seconds,
    unless saves are `pressed` for time: then fewer bytes are worth more.
    """
    if codec != AUTO or left is None:
        return Effort(workers, codec)
    if left < min(_ENOUGH_CORES, _ENOUGH_SHARE * workers) and not pressed:
        return Effort(1, RAW)
    return Effort(min(max(round(left), 1), workers), codec)


class Worth:
    """Whether `auto` finds enough to compress on this disk: if not, chunks stay as they are.

    A fast disk leaves it time for few chunks, and it costs time to find out for which.
    """

    def __init__(self) -> None:
        self._left = 0

    def choose(self, fits: Effort) -> Effort:
        """For the next save."""
        if fits.codec != AUTO or not self._left:
            return fits
        self._left -= 1
        return Effort(fits.workers, RAW)

    def ended(self, effort: Effort, fresh_nbytes: int, written_nbytes: int) -> None:
        """A save wrote so much of so much that was to be written."""
        if effort.codec == AUTO and fresh_nbytes >= _TELLING_NBYTES:
            little = fresh_nbytes - written_nbytes < _WORTH_SHARE * fresh_nbytes
            self._left = _TRIED_EVERY - 1 if little else 0


class Efforts:
    """Learns which effort lets a loop be saved most often, the cost kept under a share of the time.

    The first saves try each; then the one is taken that allows the shortest
    interval, or among those nearly as short the one with the fewest bytes; now
    and then another is tried anew, the dearer, the more seldom.
    """

    def __init__(self, efforts: tuple[Effort, ...], overhead: float) -> None:
        """`overhead` is that share of the time."""
        self._efforts, self._overhead = efforts, overhead
        self._intervals: dict[Effort, deque[float]] = {}
        self._tried: dict[Effort, int] = {}
        self._saves = 0

    def choose(self, first: Effort) -> Effort:
        """For the next save; `first` if nothing is known yet."""
        if not self._intervals:
            return first if first in self._efforts else self._efforts[0]
        untried = [one for one in self._efforts if one not in self._intervals]
        if untried:
            return untried[-1]
        intervals = {one: self.interval(one) for one in self._efforts}
        best = min(intervals.values())
        for one in sorted(self._efforts, key=self._tried.__getitem__):
            waited = self._saves - self._tried[one]
            if waited * best >= _TRIED_EVERY * intervals[one]:
                return one
        return next(one for one in self._efforts if intervals[one] <= _AS_GOOD * best)

    def interval(self, effort: Effort) -> float:
        """Seconds from save to save that an effort which was tried needs."""
        return statistics.median(self._intervals[effort])

    def ended(self, effort: Effort, cost: float, seconds: float) -> None:
        """A save cost the loop so much, in seconds, and took so long."""
        self._saves += 1
        self._tried[effort] = self._saves
        known = self._intervals.setdefault(effort, deque(maxlen=_REMEMBERED))
        known.append(max(cost / self._overhead, seconds))
