"""`gpuckpt merge`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from gpuckpt.cli.output import print_json
from gpuckpt.merging import merge
from gpuckpt.sizes import format_nbytes


def merge_roots(
    roots: list[str],
    to: str,
    step: int | None,
    console: Console,
    *,
    as_json: bool,
    key: Path | None = None,
) -> int:
    """Put one step of several roots together in another, and say what was copied."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    errors = Console(stderr=True)
    unseen = as_json or not errors.is_terminal
    with Progress(
        *columns, TransferSpeedColumn(), console=errors, transient=True, disable=unseen
    ) as bar:
        tasks: dict[str, Any] = {}

        def progress(what: str, nbytes: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=None)
            bar.advance(tasks[what], nbytes)

        done = merge(roots, to, step, progress=progress, key=key)
    if as_json:
        print_json({"to": to, **asdict(done)})
    else:
        size = format_nbytes(done.nbytes)
        told = f"step {done.step} of {done.ranks} ranks: {len(done.files)} files, {size}, to {to}"
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    return 0
