"""What commands print: tables that fit a terminal, whole lines for pipes, JSON for scripts."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from rich.console import Console

from gpuckpt.cli.tables import Columns, lines_of

# Wide enough for any row: what reads a pipe wants a row on a line.
_PIPE_COLUMNS = 4096


class _Output(Console):
    """Standard output, which ends the command quietly if nobody reads it any more."""

    def on_broken_pipe(self) -> NoReturn:
        leave()


def make_console() -> Console:
    """Standard output: as wide as the terminal; in a pipe, rows aren't folded."""
    console = _Output(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPE_COLUMNS
    return console


def leave() -> NoReturn:
    """End the command, since whoever read its output (`| head`) wants no more: all is well."""
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    raise SystemExit(0)


def printable(text: str) -> str:
    """Text without what a terminal would obey: names and errors may be a stranger's."""
    return "".join(
        one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode("ascii")
        for one in text
    )


def shown(text: str, most: int = 100) -> str:
    """Text for a cell of a table: printable, and not endless."""
    text = text.encode("unicode_escape").decode("ascii") if not text.isprintable() else text
    return text if len(text) <= most else f"{text[: most - 1]}…"


def print_json(facts: Any) -> None:
    """Facts on standard output, NaN and infinities as words."""
    try:
        print(json.dumps(_plain(facts), indent=2), flush=True)  # noqa: T201
    except BrokenPipeError:
        leave()


def text_of(value: Any) -> str:
    """A plain value as Python writes it, which it doesn't with integers of 4,300 digits and more.

    They come from strangers, or are keys and generators' states.
    """
    try:
        return repr(value)
    except ValueError:
        return (
            hex(value) if isinstance(value, int) else f"a {type(value).__name__} of long integers"
        )


def value_facts(value: Any) -> Any:
    """A plain value for JSON: an integer that any parser reads, or text."""
    if isinstance(value, float | str):
        return value
    return value if isinstance(value, int) and value.bit_length() <= 64 else text_of(value)


def age(created: float) -> str:
    """How long ago a time was, in seconds since 1970: `12 min`."""
    seconds = max(time.time() - created, 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def shape_of(shape: Sequence[int]) -> str:
    """`512 × 512`, or `scalar`."""  # noqa: RUF002
    return " × ".join(map(str, shape)) or "scalar"  # noqa: RUF001


def print_table(console: Console, columns: Columns, rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output, as wide as it is; quick for many rows."""
    title, *lines = lines_of(columns, rows, console.width)
    console.print(title, style="bold", markup=False, soft_wrap=True)
    try:
        for line in lines:
            console.file.write(f"{line}\n")
        console.file.flush()
    except BrokenPipeError:
        leave()


def _plain(facts: Any) -> Any:
    if isinstance(facts, float) and facts - facts != 0:
        return repr(facts)
    if isinstance(facts, dict):
        return {key: _plain(value) for key, value in facts.items()}
    return [_plain(value) for value in facts] if isinstance(facts, list | tuple) else facts
