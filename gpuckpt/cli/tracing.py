"""`gpuckpt trace`: a log's spans as a trace that Perfetto and Chrome show."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gpuckpt.cli.output import print_json
from gpuckpt.errors import NotFoundError, StorageError
from gpuckpt.journal import Record, read_journal

_PROCESS = 1


def write_trace(
    where: Path, step: int | None, out: Path, console: Console, *, as_json: bool
) -> int:
    """Write the spans of one step, or of all that have some, to `out`."""
    records = [one for one in read_journal(where) if step is None or one.stats.step == step]
    traced = [one for one in records if one.spans]
    if not traced:
        what = f"step {step}" if step is not None else "any save"
        raise NotFoundError(
            f"{where}: there are no spans of {what}; Checkpointer(log=…, trace=True) keeps them"
        )
    events = trace_events(traced, str(where))
    try:
        out.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n", "ascii")
    except OSError as error:
        raise StorageError(f"can't write {out}: {error.strerror}") from error
    steps = [one.stats.step for one in traced]
    if as_json:
        print_json({"out": str(out), "steps": steps, "events": len(events)})
    else:
        told = f"{out}: {len(events)} events of {len(steps)} saves; open it in ui.perfetto.dev"
        console.print(told, markup=False, soft_wrap=True)
    return 0


def trace_events(records: Sequence[Record], name: str) -> list[dict[str, Any]]:
    """The records' spans in the Trace Event Format: one process, a thread for each thread.

    Times are whole microseconds since the first span began.
    """
    begin = min(span.start for record in records for span in record.spans)
    threads: dict[str, int] = {}
    spans = list(_spans(records, begin, threads))
    named = [_metadata("process_name", 0, name)]
    named += [_metadata("thread_name", tid, thread) for thread, tid in threads.items()]
    return named + spans


def _spans(
    records: Sequence[Record], begin: float, threads: dict[str, int]
) -> Iterator[dict[str, Any]]:
    for record in records:
        for span in record.spans:
            start = round((span.start - begin) * 1e6)
            yield {
                "name": span.stage,
                "cat": "save",
                "ph": "X",
                "ts": start,
                "dur": round((span.end - begin) * 1e6) - start,
                "pid": _PROCESS,
                "tid": threads.setdefault(span.thread, len(threads) + 1),
                "args": {
                    "step": record.stats.step,
                    "bytes": span.nbytes,
                    "cpu_us": round(span.cpu_seconds * 1e6),
                },
            }


def _metadata(name: str, tid: int, value: str) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": _PROCESS, "tid": tid, "args": {"name": value}}
