"""The figures of a save that exporters send, under the names that all of them use."""

from __future__ import annotations

import os
from pathlib import Path

from gpuckpt.journal import JournalReader, Record
from gpuckpt.observers import Observer

# Stages whose seconds are sent, besides what the loop and the save as a whole took.
STAGES = (
    *("wait", "inventory", "share", "snapshot", "held", "copy", "filter", "encode", "reread"),
    *("off_cpu", "write", "index", "sync", "manifest", "starved", "ranks"),
)
NBYTES = ("raw", "encoded", "written", "unchanged", "delta", "derived", "brought", "host")
PREFIX = "gpuckpt/"


def figures(record: Record) -> dict[str, float]:
    """A save's figures by name, in seconds and bytes; of one that failed only what it took."""
    stats = record.stats
    found = {
        "failed": 0.0 if record.error is None else 1.0,
        "stall_seconds": stats.stall_seconds,
        "background_seconds": stats.background_seconds,
        "staged_seconds": stats.staged_seconds,
        "cpu_seconds": stats.cpu_seconds,
        **{f"stage_{name}_seconds": float(getattr(stats, f"{name}_seconds")) for name in STAGES},
    }
    if record.error is None:
        found |= {f"{name}_nbytes": float(getattr(stats, f"{name}_nbytes")) for name in NBYTES}
        found["ratio"] = stats.ratio
    return found


class Before:
    """The save before, of which it is known only now how much it slowed the loop down."""

    def __init__(self) -> None:
        self._record: Record | None = None

    def slowdown(self, record: Record) -> tuple[Record, float] | None:
        """The save before `record` and its `slowdown_seconds`; None of the first."""
        before, self._record = self._record, record
        return None if before is None else (before, before.stats.slowdown_seconds)


def replay(log: str | os.PathLike[str], observer: Observer) -> int:
    """Tell an observer of all saves in a log (or in that of a root); how many there were.

    Raises:
        NotFoundError: there is no log there.
        StorageError: it can't be read.
        Exception: whatever the observer raises.
    """
    count = 0
    for record in JournalReader(Path(log)):
        observer.saved(record)
        count += 1
    return count
