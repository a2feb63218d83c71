"""`gpuckpt why-slow`: the bottleneck of the last saves."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from gpuckpt.cli.output import print_json, print_table
from gpuckpt.cli.tables import Columns
from gpuckpt.diagnosis import diagnose
from gpuckpt.errors import InvalidError
from gpuckpt.journal import Record, read_journal
from gpuckpt.sizes import format_nbytes

_COLUMNS = Columns(
    (
        *("step", "stall", "slower", "background", "work", "off-cpu", "disk"),
        *("written", "ratio", "bottleneck"),
    ),
    left=("bottleneck",),
)


def why_slow(where: Path, last: int, console: Console, *, as_json: bool) -> int:
    """Name the bottleneck of the last save in a sentence, and show the last ones' figures."""
    if last < 1:
        raise InvalidError(f"--last is 1 or more, got {last}")
    records = read_journal(where)
    found = diagnose(records)[-last:]
    records = records[-last:]
    if as_json:
        rows = [{**one.as_dict(), **asdict(told)} for one, told in zip(records, found, strict=True)]
        print_json({"saves": rows})
        return 0
    console.print(found[-1].sentence, markup=False, soft_wrap=True)
    cells = [[*_cells(one), told.bottleneck] for one, told in zip(records, found, strict=True)]
    print_table(console, _COLUMNS, cells)
    return 0


def _cells(record: Record) -> list[str]:
    """Seconds, and bytes: `work` is that of all workers, `disk` writing and committing."""
    stats = record.stats
    work = stats.copy_seconds + stats.filter_seconds + stats.encode_seconds + stats.reread_seconds
    disk = stats.write_seconds + stats.commit_seconds
    seconds = (
        *(stats.stall_seconds, stats.slowdown_seconds, stats.background_seconds),
        *(work, stats.off_cpu_seconds, disk),
    )
    cells = [str(stats.step), *(f"{one:.3f}" for one in seconds)]
    return [*cells, format_nbytes(stats.written_nbytes), f"{stats.ratio:.3f}"]
