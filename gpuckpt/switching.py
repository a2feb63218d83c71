"""Let a save's threads have the interpreter soon, for the short time that they need it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

# ADR 0020 has the figures that this was chosen by.
SWITCH_SECONDS = 0.0001


@contextlib.contextmanager
def switching_often() -> Iterator[None]:
    """Within this, a thread that wants the GIL waits a shorter time for one that keeps it.

    The switch interval is the whole interpreter's.  Whoever made it shorter puts
    it back, unless somebody else has changed it since.
    """
    before = sys.getswitchinterval()
    if before <= SWITCH_SECONDS:
        yield
        return
    sys.setswitchinterval(SWITCH_SECONDS)
    own = sys.getswitchinterval()
    try:
        yield
    finally:
        if sys.getswitchinterval() == own:
            sys.setswitchinterval(before)
