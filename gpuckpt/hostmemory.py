"""How much memory the host has left."""

from __future__ import annotations

import contextlib
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
# Of the control group (version 2), as a container sees its own.
LIMIT = Path("/sys/fs/cgroup/memory.max")


def available_nbytes() -> int | None:
    """Bytes that new arrays can have at most, swap included; None where the system doesn't say."""
    known = [one for one in (_of_system(), _of_group()) if one is not None]
    return min(known, default=None)


def _of_system() -> int | None:
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
        lines = (line.split() for line in MEMINFO.read_text("ascii").splitlines())
        kibibytes = {words[0]: int(words[1]) for words in lines}
        return (kibibytes["MemAvailable:"] + kibibytes["SwapFree:"]) << 10
    return None


def _of_group() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(LIMIT.read_text("ascii"))  # or the word "max"
    return None
