"""Axes: where ticks go, what they say, and how many values become few without a lie."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from gpuckpt.sizes import format_nbytes

# Points of a line at most; of more saves, each point stands for several.
POINTS_MAX = 120
_TIMES = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200)


@dataclass(frozen=True, slots=True)
class Unit:
    """How values are written on an axis, and what its ticks are multiples of."""

    write: Callable[[float], str]
    bases: tuple[float, ...] = (1, 2, 5, 10)
    power: float = 10.0

    def ticks(self, most: float, count: int = 4) -> list[float]:
        """From zero to at least `most`, so many steps or fewer, all round numbers."""
        if not 0 < most < math.inf:
            return [0.0, 1.0]
        rough = most / count
        below = self.power ** math.floor(math.log(rough, self.power))
        step = next((b * below for b in self.bases if b * below >= rough * (1 - 1e-9)), rough)
        return [at * step for at in range(math.ceil(most / step * (1 - 1e-9)) + 1)]


def write_seconds(seconds: float) -> str:
    """For people: `2 h 5 min`, `1.9 s`, `150 ms`, `35 us`."""
    if seconds >= 7200:
        return f"{seconds / 3600:.3g} h"
    if seconds >= 120:
        return f"{seconds / 60:.3g} min"
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 0.9995:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs" if seconds else "0 s"


def write_count(count: float) -> str:
    """A number, in as few digits as tell it: `3`, `1.25`, `12,000`."""
    if count == int(count) and abs(count) < 1e15:
        return f"{int(count):,}"
    return f"{count:.4g}"


def write_time(seconds: float, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """Seconds since 1970 as a date and a time of day, UTC; as they are if no calendar has them."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime(form)
    except (ValueError, OverflowError, OSError):
        return f"{seconds:.0f}"


SECONDS = Unit(write_seconds)
NBYTES = Unit(format_nbytes, (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024), 1024.0)
RATIO = Unit(lambda ratio: f"{ratio:.3g}")


def number_ticks(low: float, high: float, count: int = 5) -> list[tuple[float, str]]:
    """Round numbers between two, for steps."""
    if high <= low:
        return [(low, write_count(low))]
    rough = max((high - low) / count, 1.0)
    below = 10.0 ** math.floor(math.log10(rough))
    step = next(base * below for base in (1, 2, 5, 10) if base * below >= rough * (1 - 1e-9))
    first = math.ceil(low / step)
    found = [at * step for at in range(first, math.floor(high / step) + 1)]
    return [(at, write_count(at)) for at in found or [low]]


def time_ticks(low: float, high: float, count: int = 4) -> list[tuple[float, str]]:
    """Round times of day, or days, between two (seconds since 1970)."""
    rough = max((high - low) / count, 1.0)
    step = float(next((one for one in _TIMES if one >= rough), math.ceil(rough / 86400) * 86400))
    form = "%m-%d" if step >= 86400 else "%H:%M" if step >= 60 else "%H:%M:%S"
    first = math.ceil(low / step)
    found = [at * step for at in range(first, math.floor(high / step) + 1)]
    return [(at, write_time(at, form)) for at in found or [low]]


def spread_of(values: Sequence[float], write: Callable[[float], str]) -> str:
    """Least, median and most of some values, in words."""
    if not values:
        return "none"
    if min(values) == max(values):
        return write(values[0])
    least, most = write(min(values)), write(max(values))
    return f"median {write(statistics.median(values))} ({least} to {most})"


@dataclass(frozen=True, slots=True)
class Point:
    """What `count` values that follow each other come to; `x` is that of the middle one."""

    x: float
    least: float
    median: float
    most: float
    count: int
    first: str
    last: str


def thin(xs: Sequence[float], ys: Sequence[float], names: Sequence[str]) -> list[Point]:
    """At most `POINTS_MAX` points, each of as many values that follow each other."""
    size = max(math.ceil(len(xs) / POINTS_MAX), 1)
    found = []
    for at in range(0, len(xs), size):
        some = ys[at : at + size]
        middle = xs[at : at + size][len(some) // 2]
        low, high = min(some), max(some)
        last = names[min(at + size, len(names)) - 1]
        found.append(Point(middle, low, statistics.median(some), high, len(some), names[at], last))
    return found
