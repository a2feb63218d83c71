"""What is said of repeated measurements, and how a figure says where it comes from."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Spread = dict[str, float]


def spread(values: Iterable[float]) -> Spread:
    """Minimum, median and maximum."""
    known = list(values)
    return {"min": min(known), "median": statistics.median(known), "max": max(known)}


def spreads(rows: Iterable[Mapping[str, float]]) -> dict[str, Spread]:
    """The spread of each figure that all rounds have."""
    rounds = list(rows)
    return {name: spread(row[name] for row in rounds) for name in rounds[0]}


def show(result: Mapping[str, Any]) -> None:
    """One block a case: medians, with the least and the most."""
    words = [str(value) for value in result.values() if isinstance(value, str | int)]
    print(", ".join(words), flush=True)
    for name, value in result.items():
        if isinstance(value, dict):
            least, middle, most = (_text(value[one]) for one in ("min", "median", "max"))
            print(f"  {name:26} {middle}  ({least}..{most})", flush=True)
        elif isinstance(value, float):
            print(f"  {name:26} {_text(value)}", flush=True)


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write JSON, readable line by line."""
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _text(value: float) -> str:
    return f"{value:.4g}"
