"""The saves that a log tells of, and the few whose spans are shown."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gpuckpt.diagnosis import diagnose
from gpuckpt.errors import NotFoundError
from gpuckpt.journal import JournalReader, Record
from gpuckpt.layout import log_rank

# Each save is compared with all others, so of long logs with the last ones only.
DIAGNOSED_MAX = 500
# More bytes, or seconds, than any save has had.
NUMBER_LIMIT = 2.0**63


@dataclass(slots=True)
class Saves:
    """What a log says; `skipped` of its lines could not be read, `newer` of these are too new.

    `last` and `slowest` are the last save that has spans and the one that took
    longest; they are one if there is but one.  `records` have no spans.
    """

    path: str = ""
    records: list[Record] = field(default_factory=list)
    skipped: int = 0
    newer: int = 0
    last: Record | None = None
    slowest: Record | None = None
    bottlenecks: dict[str, int] = field(default_factory=dict)
    sentence: str = ""

    @property
    def traced(self) -> list[tuple[str, Record]]:
        """The saves whose spans are shown, and why these."""
        if self.last is None or self.slowest is None:
            return []
        if self.last is self.slowest:
            return [("the last", self.last)]
        return [("the last", self.last), ("the slowest", self.slowest)]

    @property
    def failed(self) -> list[Record]:
        """Those that were not saved."""
        return [record for record in self.records if record.error is not None]

    @property
    def good(self) -> list[Record]:
        """Those that are, or were, durable."""
        return [record for record in self.records if record.error is None]

    def as_dict(self) -> dict[str, Any]:
        """All of it, for `--json`: spans as stage, thread, start, end, bytes."""
        return {
            "log": self.path,
            "skipped_lines": self.skipped,
            "newer_lines": self.newer,
            "saves": [record.as_dict() for record in self.records],
            "bottlenecks": self.bottlenecks,
            "why_slow": self.sentence,
            "timelines": [
                {
                    "which": which,
                    "step": record.stats.step,
                    "spans": [list(span[:5]) for span in record.spans],
                }
                for which, record in self.traced
            ],
        }


def read_saves(where: Path) -> Saves:
    """The saves of the log at `where`, a file or a root; none at all if there is no log there.

    Raises:
        StorageError: it can't be read.
    """
    found, reader = Saves(), JournalReader(where)
    try:
        for record in reader:
            if _can_be(record):
                _take(record, found)
            else:
                found.skipped += 1
    except NotFoundError:
        return found
    found.path, found.newer = str(reader.path), reader.newer
    found.skipped += reader.skipped
    told = diagnose(found.records[-DIAGNOSED_MAX:])
    found.bottlenecks = dict(Counter(one.bottleneck for one in told).most_common())
    found.sentence = told[-1].sentence if told else ""
    return found


def read_ranks(root: Path, known: Saves) -> dict[int, Saves]:
    """The logs in a root by rank, if there are several; that of one is `known`."""
    paths = {log_rank(path.name): path for path in root.iterdir()}
    ranks = sorted(rank for rank in paths if rank is not None)
    if len(ranks) < 2:
        return {}
    return {
        rank: known if known.path == str(paths[rank]) else read_saves(paths[rank]) for rank in ranks
    }


def whole_seconds(record: Record) -> float:
    """From the call until the save was durable, or had failed."""
    return record.stats.stall_seconds + record.stats.background_seconds


def _can_be(record: Record) -> bool:
    """Whether its numbers can be a save's, and so be drawn: a log may be a stranger's."""
    stats = record.stats
    numbers = [record.ended, *stats.shares.values()]
    numbers += [one for one in stats.as_dict().values() if isinstance(one, int | float)]
    numbers += [at for span in record.spans for at in (span.start, span.end)]
    return all(0 <= one < NUMBER_LIMIT for one in numbers)


def _take(record: Record, found: Saves) -> None:
    """Keep the spans of those that are shown alone: a long log may have gigabytes of them."""
    bare = replace(record, spans=[])
    if record.spans:
        found.last = record
        if found.slowest is None or whole_seconds(record) >= whole_seconds(found.slowest):
            found.slowest = record
    found.records.append(bare)
