"""What a training process says on standard output: one JSON object a line.

Its key "event" is one of
    begin   training goes on after `step` (0: at the start)
    step    a step is done: its loss and its seconds, with any stall for a save
    saving  the save of `step` is in flight
    saved   `step` is committed: what that cost
    end     the loop's seconds, and those of waiting for the saves still in flight
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import gpuckpt
from gpuckpt.demo.layers import Array


class Journal:
    """Tells on standard output how the run goes, and never waits for a save before its end."""

    def __init__(self) -> None:
        self._saves: list[gpuckpt.Pending] = []
        self._made = self._began = self._last = time.perf_counter()

    def begin(self, done: int, parameters: dict[str, Array], xp: Any) -> None:
        """Say after which step training goes on, and how long it took to get there."""
        count = sum(array.size for array in parameters.values())
        seconds = time.perf_counter() - self._made
        tell("begin", step=done, arrays=xp.__name__, parameters=count, resume_seconds=seconds)
        self._began = self._last = time.perf_counter()

    def step(self, step: int, loss: float, pending: gpuckpt.Pending | None) -> None:
        """Say what step `step` cost, and which saves have begun or ended."""
        tell("step", step=step, loss=loss, seconds=time.perf_counter() - self._last)
        if pending is not None:
            self._saves.append(pending)
            tell("saving", step=step)
        while self._saves and self._saves[0].committed.is_set():
            tell_saved(self._saves.pop(0))
        self._last = time.perf_counter()

    def end(self) -> None:
        """Wait for the saves in flight; the loop's time is without that, the drain's is it."""
        ended = time.perf_counter()
        while self._saves:
            tell_saved(self._saves.pop(0))
        drain = time.perf_counter() - ended
        tell("end", loop_seconds=ended - self._began, drain_seconds=drain)


def tell_saved(pending: gpuckpt.Pending) -> None:
    """Wait until `pending` is committed and say what it cost; raise if it failed."""
    pending.result()
    stats = pending.stats
    tell(
        "saved",
        step=stats.step,
        stall_seconds=stats.stall_seconds,
        background_seconds=stats.background_seconds,
        raw_nbytes=stats.raw_nbytes,
        encoded_nbytes=stats.encoded_nbytes,
        ratio=stats.ratio,
    )


def tell(event: str, **facts: Any) -> None:
    """Write one line at once: whoever reads it may act on it."""
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()
