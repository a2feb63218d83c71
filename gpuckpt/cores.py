"""How many cores a training loop leaves over, while no save goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

# Linux counts idle time by the hundredth of a second.
_LEAST_SECONDS = 0.1
_TICK = os.sysconf("SC_CLK_TCK")
_IDLE = slice(4, 6)  # of the words of a core's line: `idle`, and `iowait`, when it would have run


class Cores:
    """Watches, between saves, which of the cores that this process may use are idle.

    Counts what the loop's own threads use, and what other processes do: a
    core that feeds the loop with data isn't left over either.
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
        self.restart()

    def restart(self) -> None:
        """From here on no save goes on."""
        self._since = self._clock(), self._used(), self._idle()

    def left(self) -> float | None:
        """Cores that were idle since then, on average; None as long as that isn't known.

        If that was only a moment ago, as it was the last time.
        """
        begun, used, idle = self._since
        seconds, idle_now = self._clock() - begun, self._idle()
        if seconds >= _LEAST_SECONDS:
            left = self._count - (self._used() - used) / seconds
            if idle is not None and idle_now is not None:
                left = min(left, (idle_now - idle) / seconds)
            self._left = max(left, 0.0)
        return self._left


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
