"""How many cores are left over for a save, by what was left for those before."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Linux counts idle time by the hundredth of a second, core by core.
_LEAST_SECONDS = 0.2
_TICK = os.sysconf("SC_CLK_TCK")
_IDLE = slice(4, 6)  # of the words of a core's line: `idle`, and `iowait`, when it would have run


class Cores:
    """Watches, while saves go on, which of the cores that this process may use others use.

    These are the loop's own threads, and other processes: a core that feeds
    the loop with data isn't left over either.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        used: Callable[[], float] = time.process_time,
        idle: Callable[[], float | None] | None = None,
    ) -> None:
        """`used` and `idle` are CPU seconds so far: of this process, and of nobody."""
        self._count = len(os.sched_getaffinity(0))
        self._clock, self._used, self._idle = clock, used, idle or idle_seconds
        self._left: float | None = None
        self._seconds = self._free = 0.0  # of saves since `left` was known last

    def left(self) -> float | None:
        """Cores that nobody but the last saves used, on average; None before that is known."""
        return self._left

    @contextlib.contextmanager
    def watched(self, own: Callable[[], float]) -> Iterator[None]:
        """A save goes on inside; `own()` are the CPU seconds that it has used so far."""
        begun, used, idle, mine = self._clock(), self._used(), self._idle(), own()
        try:
            yield
        finally:
            seconds, idle_now = self._clock() - begun, self._idle()
            mine = own() - mine
            beside = self._used() - used - mine
            free = self._count * seconds - beside
            if idle is not None and idle_now is not None:
                free = min(free, idle_now - idle + mine)
            self._add(seconds, free)

    def _add(self, seconds: float, free: float) -> None:
        self._seconds += seconds
        self._free += free
        if self._seconds >= _LEAST_SECONDS:
            self._left = max(self._free / self._seconds, 0.0)
            self._seconds = self._free = 0.0


def idle_seconds(path: Path = Path("/proc/stat")) -> float | None:
    """CPU seconds that the cores of this process had nothing to do, since the machine's start.

    None where the system doesn't say.
    """
    try:
        lines = [line.split() for line in path.read_text("ascii").splitlines()]
        idle = {words[0]: sum(map(int, words[_IDLE])) for words in lines if words[0][:3] == "cpu"}
        return sum(idle[f"cpu{core}"] for core in os.sched_getaffinity(0)) / _TICK
    except (OSError, ValueError, KeyError, IndexError):
        return None
