"""`python -m bench.training.tables FILE...`: docs/PERFORMANCE.md's tables of what was measured.

Least and most over the saves; ÷: bytes of the state over bytes written.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.scaling.tables import table
from bench.training.lanes import Row

DASH = "\N{EN DASH}"
GB = 1e9
RIVALS = ("bound", "zstd of XOR", "ZipNN of XOR")
Figure = Callable[[Row], float]


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser("python -m bench.training.tables", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    reports = [json.loads(path.read_text("utf-8")) for path in parser.parse_args().files]
    report = {"runs": [run for one in reports for run in one["runs"]]}
    for lines in (_runs(report), _ratios(report), _times(report)):
        print("\n".join(lines), end="\n\n")


def _runs(report: Row) -> Iterator[str]:
    head = ("state", "what", "MB")
    return table(
        head,
        (
            (
                case["name"],
                case["what"],
                f"{case['state_nbytes'] / 1e6:.1f}",
            )
            for run in report["runs"]
            for case in run["cases"]
        ),
    )


def _ratios(report: Row) -> Iterator[str]:
    head = ("state", "steps between", "whole (`zstd`)", "a delta", "mean of a lane", *RIVALS)
    return table(head, (_ratio_row(*one) for one in _lanes(report)))


def _ratio_row(case: str, interval: int, rows: Sequence[Row], deltas: Sequence[Row]) -> list[str]:
    whole = [row for row in rows if row["codec"] == "zstd"]
    lane = [row for row in rows if row["codec"] == "delta" and row["interval"] == interval]
    mean = sum(row["state_nbytes"] for row in lane) / sum(row["written_nbytes"] for row in lane)
    rivals = [over([row for row in deltas if row["rivals"]], _of_rival(name)) for name in RIVALS]
    return [
        case,
        str(interval),
        over(whole, ratio_of),
        over(deltas, ratio_of),
        f"{mean:.2f}",
        *rivals,
    ]


def _times(report: Row) -> Iterator[str]:
    head = (
        "state",
        "steps between",
        "encode: `zstd`",
        "delta",
        *RIVALS[1:],
        "restore: whole",
        "chain",
    )
    return table(head, (_time_row(*one) for one in _lanes(report)))


def _time_row(case: str, interval: int, rows: Sequence[Row], deltas: Sequence[Row]) -> list[str]:
    whole = [row for row in rows if row["codec"] == "zstd"]
    known = [row for row in deltas if row["rivals"]]
    rivals = [over(known, _cpu_of_rival(name)) for name in RIVALS[1:]]
    lane = [row for row in rows if row["codec"] == "delta" and row["interval"] == interval]
    restores = [
        over([row for row in some if "restore_cpu_s" in row], _restore)
        for some in (lane[:1], [row for row in lane[1:] if _refers(row)])
    ]
    links = max((row["links"] for row in lane if "restore_cpu_s" in row), default=0)
    encoding = (over(some, _encode) for some in (whole, deltas))
    return [case, str(interval), *encoding, *rivals, restores[0], f"{restores[1]} ({links})"]


def _lanes(report: Row) -> Iterator[tuple[str, int, list[Row], list[Row]]]:
    """A case, an interval, all rows of the case, and those of the interval's deltas."""
    for run in report["runs"]:
        for case in run["cases"]:
            rows = [row for row in run["rows"] if row["case"] == case["name"]]
            for interval in dict.fromkeys(
                row["interval"] for row in rows if row["codec"] == "delta"
            ):
                deltas = [row for row in rows if row["interval"] == interval and _refers(row)]
                yield case["name"], interval, rows, deltas


def _refers(row: Row) -> bool:
    """Whether a save of a lane of deltas has some, or chunks that hadn't changed."""
    return row["codec"] == "delta" and bool(row["delta_nbytes"] or row["unchanged_nbytes"])


def over(rows: Iterable[Row], figure: Figure) -> str:
    """`1.2-1.3`, or one number if that is all there is to say."""
    values = sorted(value for value in map(figure, rows) if not math.isnan(value))
    if not values:
        return DASH
    words = [f"{value:.1f}" if value >= 10 else f"{value:.2f}" for value in (values[0], values[-1])]
    return DASH.join(dict.fromkeys(words))


def ratio_of(row: Row) -> float:
    """The state's bytes over all that the save wrote."""
    return float(row["state_nbytes"] / row["written_nbytes"])


def _encode(row: Row) -> float:
    return float(GB * row["encode_cpu_s"] / row["state_nbytes"])


def _restore(row: Row) -> float:
    return float(GB * row["restore_cpu_s"] / row["state_nbytes"])


def _of_rival(name: str) -> Figure:
    def figure(row: Row) -> float:
        return float(row["state_nbytes"] / max(row["rivals"][name]["nbytes"], 1))

    return lambda row: figure(row) if name in row["rivals"] else float("nan")


def _cpu_of_rival(name: str) -> Figure:
    def figure(row: Row) -> float:
        there: dict[str, Any] = row["rivals"].get(name, {})
        return float(GB * there.get("cpu_s", math.nan) / row["state_nbytes"])

    return figure


if __name__ == "__main__":
    main()
