"""`python -m bench.ranks.tables FILE…`: docs/SCALE.md's tables of what was measured.

`--into` puts each in the place of the table with the same head.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.ranks.alone import Row
from bench.ranks.growth import exponent
from bench.scaling.tables import placed, table

Rows = Sequence[Row]
# What is asked of a store in a commit, but for lists, whose pages are counted apart.
CALLS = ("create", "read", "size", "rename", "remove", "sync_names")


def main() -> None:
    """Print all tables, or put them in their places."""
    parser = argparse.ArgumentParser("python -m bench.ranks.tables", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--into", type=Path, help="a document that has these tables")
    options = parser.parse_args()
    found = [
        row for path in options.files for row in json.loads(path.read_text("utf-8"))["results"]
    ]
    blocks = ["\n".join(lines) for lines in blocks_of(found)]
    if options.into is None:
        print("\n\n".join(blocks))
    else:
        options.into.write_text(placed(options.into.read_text("utf-8"), blocks), "utf-8")


def blocks_of(rows: Rows) -> Iterator[Iterator[str]]:
    """The lines of each table."""
    for make in (_files, _opened, _shared, _committed, _met, _grows):
        yield make(rows)


def of(rows: Rows, case: str) -> list[Row]:
    """Those of one case."""
    return [row for row in rows if row["case"] == case]


def _files(rows: Rows) -> Iterator[str]:
    head = ("state", "ranks", "tensors", "rows", "a part", "all parts", "÷ zstd", "the manifest")
    return table(
        (*head, "packed in", "read in"),
        (
            (
                *(row["kind"], f"{row['ranks']:,}", str(row["tensors"]), f"{row['rows']:,}"),
                *(nbytes(row["part_nbytes"]), nbytes(row["parts_nbytes"])),
                *(f"{row['part_over_zstd']:.1f}", nbytes(row["world_nbytes"])),
                *(seconds(row[f"{what}_world_s"]["median"]) for what in ("pack", "unpack")),
            )
            for row in of(rows, "files")
        ),
    )


def _opened(rows: Rows) -> Iterator[str]:
    own = {_key(row): row for row in of(rows, "own")}
    head = ("state", "ranks", "tensors", "reads of all parts", "bytes", "CPU", "memory")
    return table(
        (*head, "reads of its own", "bytes", "CPU"),
        (
            (
                *(row["kind"], f"{row['ranks']:,}", str(row["tensors"]), f"{row['reads']:,}"),
                *(nbytes(row["read_nbytes"]), seconds(row["cpu_s"]), nbytes(row["peak_nbytes"])),
                *(str(one["reads"]), nbytes(one["read_nbytes"]), seconds(one["cpu_s"])),
            )
            for row, one in ((row, own[_key(row)]) for row in of(rows, "open"))
        ),
    )


def _key(row: Row) -> tuple[str, int, int]:
    return row["kind"], row["ranks"], row["tensors"]


def _shared(rows: Rows) -> Iterator[str]:
    head = ("state", "ranks", "tensors", "rounds", "a rank gives", "each gets", "CPU", "memory")
    return table(
        head,
        (
            (
                *(row["kind"], f"{row['ranks']:,}", str(row["tensors"]), str(row["rounds"])),
                *(nbytes(row["given_nbytes"]), nbytes(row["got_nbytes"])),
                *(seconds(row["cpu_s"]), nbytes(row["peak_nbytes"])),
            )
            for row in of(rows, "share")
        ),
    )


def _committed(rows: Rows) -> Iterator[str]:
    head = ("ranks", "files", "a rank gives", "each gets", "removals", "pages of lists")
    return table(
        (*head, "other requests", "CPU", "clock", "then, to delete", "CPU to enter", "a list"),
        (
            (
                *(f"{row['ranks']:,}", f"{row['files']:,}"),
                *(nbytes(sum(row[f"{what}_nbytes"])) for what in ("given", "got")),
                *(f"{row['calls_remove']:,}", f"{row['calls_pages']:,}"),
                str(sum(row.get(f"calls_{name}", 0) for name in CALLS if name != "remove")),
                *(seconds(row[f"{name}_s"]) for name in ("cpu", "clock", "tidy_clock")),
                *(seconds(row[f"{name}_cpu_s"]) for name in ("enter", "list")),
            )
            for row in of(rows, "commit")
        ),
    )


def _met(rows: Rows) -> Iterator[str]:
    head = ("ranks", "rank 0: puts", "waits", "removals", "bytes got", "others: puts", "waits")
    return table(
        (*head, "removals", "bytes got", "CPU of all"),
        (
            (
                f"{row['ranks']:,}",
                *(f"{row[f'lead_{what}']:.0f}" for what in ("puts", "waits", "removes")),
                nbytes(row["lead_got_nbytes"]),
                *(f"{row[f'other_{what}']:.0f}" for what in ("puts", "waits", "removes")),
                *(nbytes(row["other_got_nbytes"]), seconds(row["cpu_s"])),
            )
            for row in of(rows, "meeting")
        ),
    )


def _grows(rows: Rows) -> Iterator[str]:
    figures: list[tuple[str, str, Callable[[Row], float]]] = [
        ("files", "bytes of all parts", lambda row: row["parts_nbytes"]),
        ("files", "bytes of the manifest", lambda row: row["world_nbytes"]),
        ("open", "CPU to read all parts", lambda row: row["cpu_s"]),
        ("own", "CPU to read the own one", lambda row: row["cpu_s"]),
        ("share", "bytes each gets at first", lambda row: row["got_nbytes"]),
        ("share", "CPU to share out", lambda row: row["cpu_s"]),
        ("commit", "CPU of the lead's commit", lambda row: row["cpu_s"]),
        ("commit", "bytes each gets in a save", lambda row: sum(row["got_nbytes"])),
        ("meeting", "CPU of all for a round", lambda row: row["cpu_s"]),
    ]
    body = []
    for case, what, figure in figures:
        found = of(rows, case)
        for kind in dict.fromkeys(row.get("kind", "any") for row in found):
            few = min((row.get("tensors", 0) for row in found), default=0)
            chosen = [
                row
                for row in found
                if row.get("kind", "any") == kind and row.get("tensors", 0) == few
            ]
            k = exponent((row["ranks"], figure(row)) for row in chosen)
            if k is not None:
                body.append((what, kind, f"{k:.2f}"))
    return table(("grows with ranks to the power of", "state", "exponent"), body)


def nbytes(value: float) -> str:
    """For people."""
    for unit in ("B", "KB", "MB", "GB"):
        if value < 999.5 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"


def seconds(value: float) -> str:
    """For people."""
    return f"{value:.3g} s" if value >= 0.0995 else f"{1e3 * value:.2g} ms"


if __name__ == "__main__":
    main()
