"""Prometheus' text format, for node exporter's textfile collector or an endpoint of one's own."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from gpuckpt.errors import InvalidError
from gpuckpt.journal import Record
from gpuckpt.metrics.figures import NBYTES, STAGES, Before
from gpuckpt.stats import Stats

_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_OUTCOMES = ("durable", "failed")


class Prometheus:
    """Counts saves, and holds the last one's figures; `text` has them for a scrape.

    With a `path` (a name that ends in `.prom`, for the textfile collector) the
    file is replaced, whole at any moment, after each save.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """`labels` are on every line, such as `{"run": "a7", "rank": "0"}`.

        Raises:
            InvalidError: a label's name can't be one.
        """
        self._path = None if path is None else Path(path)
        self._labels = {name: str(value) for name, value in (labels or {}).items()}
        for name in self._labels:
            if not _LABEL.fullmatch(name) or name in {"outcome", "stage", "kind"}:
                raise InvalidError(f"{name!r} can't be the name of a label of one's own")
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(_OUTCOMES, 0)
        self._totals = {"stall_seconds": 0.0, "slowdown_seconds": 0.0, "written_bytes": 0.0}
        self._last: Stats | None = None
        self._durable: tuple[int, float] | None = None
        self._before = Before()

    def saved(self, record: Record) -> None:
        """Take note of a save, and replace the file if there is one.

        Raises:
            OSError: the file can't be written.
        """
        with self._lock:
            stats = record.stats
            self._counts[_OUTCOMES[record.error is not None]] += 1
            self._totals["stall_seconds"] += stats.stall_seconds
            if (found := self._before.slowdown(record)) is not None:
                self._totals["slowdown_seconds"] += found[1]
            if record.error is None:
                self._totals["written_bytes"] += stats.written_nbytes
                self._last, self._durable = stats, (stats.step, record.ended)
        if self._path is not None:
            beside = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
            beside.write_text(self.text(), "utf-8")
            beside.replace(self._path)

    def text(self) -> str:
        """All of it, in the text exposition format 0.0.4; any thread may ask."""
        with self._lock:
            return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        yield from _family("saves_total", "counter", "Saves that have ended.")
        for outcome, count in self._counts.items():
            yield self._line("saves_total", count, outcome=outcome)
        about = {
            "stall_seconds": "Seconds in which saves blocked the loop.",
            "slowdown_seconds": "Seconds that steps beside saves took longer than others.",
            "written_bytes": "Bytes that saves wrote.",
        }
        for name, value in self._totals.items():
            yield from _family(f"{name}_total", "counter", about[name])
            yield self._line(f"{name}_total", value)
        if self._durable is not None:
            step, when = self._durable
            yield from _family("last_durable_step", "gauge", "The newest step that is durable.")
            yield self._line("last_durable_step", step)
            told = "When it was durable, in seconds since 1970."
            yield from _family("last_durable_timestamp_seconds", "gauge", told)
            yield self._line("last_durable_timestamp_seconds", when)
        if self._last is not None:
            yield from self._last_lines(self._last)

    def _last_lines(self, stats: Stats) -> Iterator[str]:
        yield from _family("last_save_seconds", "gauge", "What the last save took, by stage.")
        for stage in ("stall", "background", *STAGES):
            yield self._line(
                "last_save_seconds", float(getattr(stats, f"{stage}_seconds")), stage=stage
            )
        yield from _family("last_save_bytes", "gauge", "Bytes of the last save, by kind.")
        for kind in NBYTES:
            yield self._line("last_save_bytes", int(getattr(stats, f"{kind}_nbytes")), kind=kind)
        told = "Bytes in memory for each byte on disk, of the last save."
        yield from _family("last_save_ratio", "gauge", told)
        yield self._line("last_save_ratio", stats.ratio)

    def _line(self, name: str, value: float, **more: str) -> str:
        labels = ",".join(
            f'{label}="{_escaped(told)}"' for label, told in {**self._labels, **more}.items()
        )
        return f"gpuckpt_{name}{{{labels}}} {value!r}" if labels else f"gpuckpt_{name} {value!r}"


def _family(name: str, kind: str, told: str) -> Iterator[str]:
    yield f"# HELP gpuckpt_{name} {told}"
    yield f"# TYPE gpuckpt_{name} {kind}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
