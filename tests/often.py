"""How often a property is tried: the full number in `make test-long`, a third of it else.

Properties that say no number are tried 100 times, or a third of that: see `tests/conftest.py`.
Examples are drawn anew in each run, so that many short runs try as many as a long one.
"""

from __future__ import annotations

import os

LONG = os.environ.get("GPUCKPT_TEST_LONG") == "1"


def often(count: int) -> int:
    """How many examples of `count` to try in this run."""
    return count if LONG else -(-count // 3)
