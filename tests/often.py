"""How often a property is tried: the full number in `make test-long`, a third of it else.

Properties that say no number are tried 100 times, or a third of that: see `tests/conftest.py`.
Examples are drawn anew in each run, so that many short runs try as many as a long one. So are the
moments of those tests that have something fail at every one, and the bugs planted in kernels.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

LONG = os.environ.get("GPUCKPT_TEST_LONG") == "1"
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID")  # the same for all workers of a run


def often(count: int) -> int:
    """How many examples of `count` to try in this run."""
    return count if LONG else -(-count // 3)


def some(choices: Iterable[T]) -> list[T]:
    """Which to try in this test, in their order."""
    return _drawn(choices, random.SystemRandom())


def of_this_run(choices: Iterable[T]) -> list[T]:
    """Which to try in this run, for parameters; all where no workers share it (without `-n`)."""
    return list(choices) if RUN is None else _drawn(choices, random.Random(RUN))


def _drawn(choices: Iterable[T], rng: random.Random) -> list[T]:
    known = list(choices)
    return [known[at] for at in sorted(rng.sample(range(len(known)), often(len(known))))]
