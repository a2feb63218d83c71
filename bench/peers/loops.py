"""Training loops for a save to disturb, and how much it takes from them.

lost = wall time of the window - steps in it x the time of an undisturbed step.
The window goes from the moment that the save is asked for until it is durable,
to the end of the step then in progress; undisturbed steps are timed right
before and right after, since a machine's pace drifts.  A process measures some
saves, each with its own undisturbed steps: their medians are its figures.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.peers.peer import Peer

Step = Callable[[], None]
Figures = dict[str, Any]

THREADS = {"gil": 1, "matmul1": 1, "matmul2": 2}  # of BLAS, set before numpy is imported


def step_of(loop: str) -> Step:
    """One step, of some milliseconds: many tiny operations that hold the GIL, or one matmul."""
    if loop == "gil":
        small = np.ones(16, np.float32)

        def eager() -> None:
            for _ in range(4000):
                np.add(small, small, out=small)
                np.multiply(small, 0.5, out=small)

        return eager
    rng = np.random.default_rng(3)
    a, b = (rng.standard_normal((640, 640), np.float32) for _ in range(2))
    out = np.empty_like(a)

    def product() -> None:
        np.matmul(a, b, out=out)

    return product


@dataclass(frozen=True, slots=True)
class Lap:
    """Steps that were run, in how many seconds, and the longest."""

    steps: int
    seconds: float
    longest: float

    @property
    def mean(self) -> float:
        """Seconds a step."""
        return self.seconds / self.steps


def run_until(stop: Callable[[], bool], peer: Peer, step: Step) -> Lap:
    """Step until `stop`, at least once, each inside the peer's `update`."""
    steps, longest = 0, 0.0
    begun = last = time.perf_counter()
    while True:
        with peer.update():
            step()
        now = time.perf_counter()
        steps, longest, last = steps + 1, max(longest, now - last), now
        if stop():
            return Lap(steps, now - begun, longest)


def for_seconds(seconds: float) -> Callable[[], bool]:
    """A `stop` that says so after `seconds`."""
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() >= end


def beside(
    peer: Peer, loop: str, at_step: int, settle: Callable[[], None], undisturbed: float = 0.5
) -> Figures:
    """Save `at_step` beside a loop; what that took from the loop.

    `settle` makes durable what the peer has finished.  Undisturbed steps are
    run for so many seconds before, and as many after.
    """
    step = step_of(loop)
    run_until(for_seconds(undisturbed / 4), peer, step)
    before = run_until(for_seconds(undisturbed), peer, step)
    durable = threading.Event()
    failures: list[BaseException] = []
    ended: list[float] = []
    begun = time.perf_counter()
    peer.begin(at_step)
    blocked = time.perf_counter() - begun

    def wait() -> None:
        try:
            peer.finish()
            settle()
        except BaseException as error:
            failures.append(error)
        ended.append(time.perf_counter())
        durable.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    window = run_until(durable.is_set, peer, step)
    wall = time.perf_counter() - begun
    waiter.join()
    if failures:
        raise failures[0]
    after = run_until(for_seconds(undisturbed), peer, step)
    undisturbed_step = (before.seconds + after.seconds) / (before.steps + after.steps)
    return {
        "lost_s": wall - window.steps * undisturbed_step,
        "blocked_s": blocked,
        "in_flight_s": ended[0] - begun,
        "step_s": undisturbed_step,
        "steps": window.steps,
        "longest_over_step": window.longest / undisturbed_step,
        "after_over_before": after.mean / before.mean,
    }


def middle(saves: Iterable[Figures]) -> Figures:
    """The median of each figure, and in `saves` those of every save."""
    saves = list(saves)
    return {name: statistics.median(one[name] for one in saves) for name in saves[0]} | {
        "saves": saves
    }
