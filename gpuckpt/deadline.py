"""How to save before a deadline, by what saves have taken: nothing here is guessed."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gpuckpt.effort import AUTO, RAW
from gpuckpt.stats import Stats

# Saves vary: one of which this many times as long would still be in time is safe.
MARGIN = 1.5
# The slowest of so many counts.
REMEMBERED = 3

# With a save in flight: let it commit, or give it up for one of the state as it is now.
Turn = Literal["finish", "give up"]


@dataclass(frozen=True, slots=True)
class Way:
    """A codec to save with, and how long that takes, in seconds; None if nothing is known."""

    codec: str
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Took:
    """What a save took, in seconds: `disk` of `background` it didn't wait for encoders."""

    begin: float
    background: float
    disk: float
    commit: float
    look: float
    """Thread seconds of fingerprints: of these no codec can do without."""
    more: float
    """Bytes of all that changed, for each byte that was written."""

    @classmethod
    def of(cls, stats: Stats) -> Took:
        """From a save that has committed."""
        changed = stats.raw_nbytes - stats.unchanged_nbytes - stats.derived_nbytes
        return cls(
            begin=max(stats.stall_seconds - stats.wait_seconds, 0.0),
            background=stats.background_seconds,
            disk=max(stats.background_seconds - stats.starved_seconds, 0.0),
            commit=stats.commit_seconds,
            look=stats.filter_seconds,
            more=max(changed / stats.written_nbytes, 1.0) if stats.written_nbytes else 1.0,
        )

    @property
    def seconds(self) -> float:
        """From its beginning until it was durable."""
        return self.begin + self.background

    def without_encoding(self, workers: int) -> float:
        """How long it would have been, had the chunks been written as they are."""
        return self.begin + max(self.look / workers, self.disk * self.more)


class Taken:
    """What a run's saves took, by codec: the slowest of the last few."""

    def __init__(self) -> None:
        self._saves: dict[str, deque[Took]] = {}
        self._last: Took | None = None

    def note(self, codec: str, stats: Stats) -> None:
        """A save has committed."""
        self._last = Took.of(stats)
        self._saves.setdefault(codec, deque(maxlen=REMEMBERED)).append(self._last)

    def seconds(self, codec: str) -> float | None:
        """How long a save takes by a codec that was used."""
        return max((took.seconds for took in self._saves.get(codec, ())), default=None)

    def remaining(self, elapsed: float, share: float, codec: str) -> float | None:
        """Seconds until a save in flight is durable; see the function `remaining`."""
        every = [took for saves in self._saves.values() for took in saves]
        commit = max((took.commit for took in every), default=0.0)
        total = max((took.background for took in self._saves.get(codec, ())), default=None)
        return remaining(elapsed, share, total, commit)

    def ways(self, codec: str, workers: int) -> tuple[Way, ...]:
        """What there is to choose from, from the fewest bytes to the least work.

        What was asked for, as long as the disk isn't kept waiting, and chunks
        as they are.  Each writes only what has changed since the save before.
        """
        codecs = dict.fromkeys((codec, AUTO, RAW)) if codec != RAW else (RAW,)
        return tuple(Way(one, self._seconds_or_bound(one, codec, workers)) for one in codecs)

    def _seconds_or_bound(self, codec: str, asked: str, workers: int) -> float | None:
        known = self.seconds(codec)
        if known is not None or self._last is None:
            return known
        if codec not in (AUTO, RAW):
            # It wasn't used yet, others were: by how much it is slower nobody knows.
            return None
        bases = self._saves.get(asked) or (self._last,)
        return max(took.without_encoding(workers) for took in bases)


def choose(ways: Sequence[Way], left: float) -> Way:
    """The way that is in time with a margin and has the fewest bytes; if none, the soonest.

    If nothing is known of any: the one that encodes only as long as the disk
    isn't kept waiting, which takes no longer than raw ones.
    """
    known = [(way.seconds, way) for way in ways if way.seconds is not None]
    if not known:
        return next((way for way in ways if way.codec == AUTO), ways[-1])
    for seconds, way in known:
        if seconds * MARGIN <= left:
            return way
    # Of those that are as soon, the one with the least work.
    return min(reversed(known), key=lambda one: one[0])[1]


def remaining(elapsed: float, share: float, total: float | None, commit: float) -> float | None:
    """Seconds until a save in flight is durable, or None if that can't be said yet.

    After `elapsed` seconds, `share` of its bytes have come to the disk; others
    like it took `total`, of which `commit` after the last byte.  One that takes
    longer than it should is expected to be late by as much again.
    """
    known = [] if total is None else [abs(total - elapsed)]
    if share > 0:
        late = [] if total is None else [elapsed - total]
        known = [elapsed * (1 - share) / share + commit, *late]
    return max(known, default=None)


def turn(left: float, in_flight: float | None, seconds: float | None) -> Turn:
    """What to do with a save in flight that takes `in_flight` more seconds.

    A new one takes `seconds`.  It finishes if there is time for it, whether or
    not there is for both: it is under way.  It is given up only for one that is
    in time where it is not, or that is sooner where none is.
    """
    if in_flight is None or seconds is None or in_flight <= left:
        return "finish"
    return "give up" if seconds < in_flight else "finish"
