"""`gpuckpt convert`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from gpuckpt.cli.output import print_json, printable
from gpuckpt.conversion import Conversion, convert
from gpuckpt.conversion.report import told_checked
from gpuckpt.errors import InvalidError
from gpuckpt.sizes import format_nbytes


def convert_checkpoint(
    source: str, target: str, console: Console, *, as_json: bool, **options: Any
) -> int:
    """Convert, with a progress bar on a terminal, and say what is lost."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    errors = Console(stderr=True)
    unseen = as_json or not errors.is_terminal
    with Progress(
        *columns, TransferSpeedColumn(), console=errors, transient=True, disable=unseen
    ) as bar:
        tasks: dict[str, Any] = {}

        def progress(what: str, nbytes: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.advance(tasks[what], nbytes)

        done = convert(source, target, progress=progress, **options)
    if as_json:
        print_json({**asdict(done), "nbytes": done.nbytes, "checked": done.checked})
    else:
        for line in _lines(done):
            console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
    return 0


def parse_axes(given: Sequence[str]) -> dict[str, int]:
    """`NAME=AXIS` of each parameter, by name.

    Raises:
        InvalidError: one is written otherwise.
    """
    found: dict[str, int] = {}
    for one in given:
        name, _, axis = one.rpartition("=")
        if not name or not axis.isdecimal() or not axis.isascii():
            raise InvalidError(f"--axis is NAME=NUMBER, ip1_weight=1 for example; got {one!r}")
        found[name] = int(axis)
    return found


def _lines(done: Conversion) -> list[str]:
    count = len(done.tensors)
    told = f"{count} tensor{'' if count == 1 else 's'}, {format_nbytes(done.nbytes)}"
    checked = f"; {told_checked(done)}" + ("; read back and compared" if done.verified else "")
    places = f"{done.source} ({done.source_format}) to {done.target} ({done.target_format})"
    return [f"{told}, from {places}{checked}", *(f"  lost: {one}" for one in done.lost)]
