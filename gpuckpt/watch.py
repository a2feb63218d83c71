"""Tells the log what a save waits for, if it makes no progress."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from gpuckpt.stats import Stats

log = logging.getLogger("gpuckpt")

# A disk or device that does nothing for so long is worth a line in the log, and each time again.
PATIENCE_SECONDS = 60.0
_STAGES = {"gpuckpt.stores": "the storage", "gpuckpt.devices": "the device"}
_STAGES |= {"gpuckpt.groups": "the other ranks"}


class Watch:
    """Looks at a save now and then, from another thread than the save's."""

    def __init__(self, stats: Stats, clock: Callable[[], float] = time.monotonic) -> None:
        """`stats` are the save's, which count what has been done."""
        self._stats, self._clock = stats, clock
        self._thread: int | None = None
        self._seen: object = None
        self._since, self._told = clock(), 0

    def begin(self) -> None:
        """The save's thread is the one that calls this."""
        self._thread = threading.get_ident()

    def look(self) -> None:
        """If the save is where it was for a minute, or for another one, warn."""
        seen = self._stats.chunks, self._stats.written_nbytes, self._places()
        now = self._clock()
        if seen != self._seen:
            self._seen, self._since, self._told = seen, now, 0
        elif now - self._since >= PATIENCE_SECONDS * (self._told + 1):
            self._told += 1
            log.warning(
                "step %d: waiting for %s for %.0f s; the save goes on",
                *(self._stats.step, self.stage(), now - self._since),
            )

    def stage(self) -> str:
        """What the save waits for: what its thread is in or, if that waits for others, they."""
        frames = _frames(self._thread)
        if not frames:
            return "its thread"
        if stage := _stage(frames):
            return stage
        others = (thread.ident for thread in threading.enumerate() if _is_worker(thread))
        stages = [stage for one in others if (stage := _stage(_frames(one)))]
        return stages[0] if stages else "its threads"

    def _places(self) -> tuple[object, ...]:
        """Where its thread is in the engine's code."""
        return tuple((frame.f_code, frame.f_lasti) for frame in _frames(self._thread))


def _frames(thread: int | None) -> list[FrameType]:
    """The functions that a thread is in, the innermost first."""
    every = sys._current_frames()  # noqa: SLF001 - documented, and there is no other way
    return list(_outwards(every.get(thread))) if thread is not None else []


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _stage(frames: list[FrameType]) -> str | None:
    """The outermost call of a port, with its name."""
    found = None
    for frame in frames:
        module = frame.f_globals.get("__name__", "")
        for port, words in _STAGES.items():
            if module.startswith(port + ".") or module == port:
                found = f"{words} ({frame.f_code.co_name.strip('_')})"
    return found


def _is_worker(thread: threading.Thread) -> bool:
    return thread.name.startswith(("gpuckpt-work", "gpuckpt-draw"))
