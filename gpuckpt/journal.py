"""A log of saves: one JSON object a line, appended once a save has committed or failed."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpuckpt.errors import (
    CheckpointError,
    FormatError,
    InvalidError,
    NotFoundError,
    StorageError,
)
from gpuckpt.layout import LOG, LOG_OF_RANK, log_rank
from gpuckpt.spans import Span, pack_spans, unpack_spans
from gpuckpt.stats import Stats
from gpuckpt.stores import Store
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.regular import open_file

log = logging.getLogger("gpuckpt")

VERSION = 1
Log = bool | str | os.PathLike[str] | None


@dataclass(frozen=True, slots=True)
class Record:
    """What a log says of one save.

    `ended` is in seconds since 1970; `error` is None for a save that has
    committed.  `spans` are in seconds since 1970, too.
    """

    ended: float
    stats: Stats
    error: str | None = None
    spans: list[Span] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """All facts but the spans, for `--json`."""
        return {"ended": self.ended, "error": self.error, **self.stats.as_dict()}


class Journal:
    """A log that one checkpointer writes to.  It never fails a save, and isn't synced."""

    def __init__(self, path: Path) -> None:
        """Nothing is written before the first save has ended."""
        self.path = path
        self._before: Stats | None = None

    def append(self, stats: Stats, failure: BaseException | None) -> None:
        """Add a line; if that can't be done, a warning in Python's log says so."""
        try:
            line = self._line(stats, failure)
            with open(self.path, "ab+", opener=open_file) as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        line = b"\n" + line  # a crash cut the last line short
                file.write(line)
        except (OSError, ValueError, TypeError) as error:
            log.warning("step %d isn't in the log %s: %s", stats.step, self.path, error)
        self._before = stats

    def _line(self, stats: Stats, failure: BaseException | None) -> bytes:
        """A save's facts.  How much it slowed the loop down is known only later: the next says."""
        facts: dict[str, Any] = {"gpuckpt_log": VERSION, "ended": time.time()}
        facts["error"] = None if failure is None else f"{type(failure).__name__}: {failure}"
        facts["stats"] = stats.as_dict()
        if self._before is not None:
            facts["before"] = [self._before.step, self._before.slowdown_seconds]
        if stats.spans is not None:
            facts["clock"] = time.time() - time.perf_counter()
            facts["every"] = stats.spans.every
            facts["spans"] = pack_spans(stats.spans.all())
        return json.dumps(facts, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


def open_journal(where: Log, store: Store, rank: int = 0) -> Journal | None:
    """The log that a checkpointer's option `log` asks for: True for one in the root.

    Each of several ranks has one of its own: all but rank 0 with their number in its name.

    Raises:
        InvalidError: that is no place for a file.
    """
    if where is None or where is False:
        return None
    if where is not True:
        path = Path(where).expanduser().absolute()
        if path.is_dir():
            raise InvalidError(f"log is a file, and {path} is a directory; log=True is for a root")
        if rank:
            path = path.with_name(f"{path.stem}.r{rank}{path.suffix}")
        return Journal(path.resolve())  # its user may well have given a link
    if not isinstance(store, LocalStore):
        raise InvalidError(f"log=True needs a root of local files; give log= a path ({store.root})")
    return Journal(Path(store.root) / (LOG_OF_RANK % rank if rank else LOG))


def read_journal(where: Path) -> list[Record]:
    """A log's saves, in the order of its lines; `where` is the log, or the root that has it.

    Of the logs of several ranks in a root it is that of the first.

    Lines that a crash or a full disk cut short are left out.

    Raises:
        NotFoundError: there is no log, or no save in it.
        StorageError: it can't be read.
        FormatError: its lines are those of a newer gpuckpt.
    """
    reader = JournalReader(where)
    records = list(reader)
    if records:
        return records
    raise reader.nothing()


class JournalReader:
    """A log's saves, line by line, so that a long one needn't be in memory as a whole.

    `skipped` lines were no saves: those that a crash or a full disk cut short,
    and those that a `newer` gpuckpt wrote.  Iterate once; raises as `read_journal`
    does if there is no log, but not for one without a save.
    """

    def __init__(self, where: Path) -> None:
        """`where` is the log, or the root that has it; nothing is read yet."""
        self._own = where.is_dir()
        self.path = _log_in(where) if self._own else where
        self.skipped = self.newer = 0

    def __iter__(self) -> Iterator[Record]:
        """Each save; how much it slowed the loop down is filled in with the next."""
        before: Record | None = None
        for line in self._lines():
            try:
                before = _record(self._facts(line), before)
            except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
                log.debug("%s: a line was left out: %s", self.path, error)
                self.skipped += bool(line.strip())
                continue
            yield before

    def nothing(self) -> CheckpointError:
        """Why there was no save in it."""
        if self.newer:
            told = f"a log of a newer gpuckpt, this one reads {VERSION}; upgrade it"
            return FormatError(f"{self.path}: {told}")
        return NotFoundError(f"{self.path}: there is no save in it")

    def _lines(self) -> Iterator[bytes]:
        path = self.path
        try:
            with open(path, "rb", opener=open_file if self._own else None) as file:
                yield from file
        except StorageError:
            raise
        except FileNotFoundError as error:
            hint = "Checkpointer(log=True) keeps one"
            raise NotFoundError(f"{path}: there is no log; {hint}") from error
        except OSError as error:
            raise StorageError(f"can't read {path}: {error.strerror}") from error

    def _facts(self, line: bytes) -> dict[str, Any]:
        try:
            facts = json.loads(line)
        except RecursionError as error:
            raise ValueError("it is too deep") from error
        version = facts.get("gpuckpt_log")
        self.newer += isinstance(version, int) and version > VERSION
        if version != VERSION:
            raise ValueError("it is of another version")
        return dict(facts)


def _log_in(root: Path) -> Path:
    """The log of the first rank that has one there."""
    ranks = sorted(rank for path in root.iterdir() if (rank := log_rank(path.name)) is not None)
    return root / (LOG_OF_RANK % ranks[0] if ranks and ranks[0] else LOG)


def _record(facts: dict[str, Any], before: Record | None) -> Record:
    """A line's save; what it tells of the one `before` is filled in there."""
    stats = Stats.from_dict(facts["stats"])
    error = facts["error"]
    spans = []
    if "spans" in facts:
        clock = float(facts["clock"])
        spans = [
            span._replace(start=span.start + clock, end=span.end + clock)
            for span in unpack_spans(facts["spans"])
        ]
    step, slowdown = facts.get("before", (None, 0.0))
    ended = float(facts["ended"])
    if before is not None and before.stats.step == step:
        before.stats.slowdown_seconds = float(slowdown)
    return Record(ended, stats, None if error is None else str(error), spans)
