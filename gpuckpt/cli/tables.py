"""Tables of text that fit a terminal: columns are left out, or folded, until they do."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, chop_cells

_GAP = "  "


@dataclass(frozen=True, slots=True)
class Columns:
    """A table's columns: their titles, and what may become of them.

    Those that are `optional` are left out if they are empty.  Where the rest is too wide,
    those that are `expendable` are left out, the first named first; then those that are
    `flexible` are folded, to no less than so many columns.  Those `left` begin on the left.
    """

    titles: tuple[str, ...]
    left: Collection[str]
    optional: Collection[str] = ()
    expendable: Sequence[str] = ()
    flexible: Sequence[str] = ("name",)
    least: int = 18


def lines_of(columns: Columns, rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """The table's lines, of which the first are the titles; none ends with blanks.

    Cells are one line each, of printable characters.
    """
    shown = [
        at
        for at, title in enumerate(columns.titles)
        if title not in columns.optional or any(row[at] for row in rows)
    ]
    widest = {
        at: max([cell_len(columns.titles[at]), *(cell_len(row[at]) for row in rows)])
        for at in shown
    }
    for title in columns.expendable:
        if _needed(columns, widest) <= width:
            break
        widest.pop(columns.titles.index(title), None)
    widths = _folded(columns, widest, width)
    lines: list[str] = []
    for row in (columns.titles, *rows):
        lines += _row_lines(columns, row, widths)
    return lines


def _needed(columns: Columns, widest: dict[int, int]) -> int:
    """The least width of all columns, with what may be folded folded as far as that goes."""
    least = [
        min(n, columns.least) if columns.titles[at] in columns.flexible else n
        for at, n in widest.items()
    ]
    return sum(least) + len(_GAP) * (len(least) - 1)


def _folded(columns: Columns, widest: dict[int, int], width: int) -> dict[int, int]:
    """The columns' widths: where they are too wide, the widest that may be folded gives way."""
    widths = dict(widest)
    excess = sum(widths.values()) + len(_GAP) * (len(widths) - 1) - width
    flexible = [at for at in widths if columns.titles[at] in columns.flexible]
    while excess > 0 and flexible:
        most = max(flexible, key=widths.__getitem__)
        if widths[most] <= columns.least:
            break
        widths[most] -= 1
        excess -= 1
    return widths


def _row_lines(columns: Columns, row: Sequence[str], widths: dict[int, int]) -> Iterator[str]:
    cells = {at: _pieces(row[at], width) for at, width in widths.items()}
    for line in range(max(map(len, cells.values()), default=0)):
        texts = []
        for at, pieces in cells.items():
            text = pieces[line] if line < len(pieces) else ""
            blanks = " " * (widths[at] - cell_len(text))
            left = columns.titles[at] in columns.left
            texts.append(text + blanks if left else blanks + text)
        yield _GAP.join(texts).rstrip()


def _pieces(text: str, width: int) -> list[str]:
    return [text] if cell_len(text) <= width else chop_cells(text, width)
