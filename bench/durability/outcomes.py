"""What became of flipped bits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

FOUND = "found and blamed on its tensor or file"
RIGHT = "changes nothing: the data is right"
PASSED = "too few bytes passed by: nothing was flipped"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one flip: where it was, what was to become of it, and a fault, if there was one."""

    place: str
    verdict: str
    fault: str = ""


def counted(outcomes: Iterable[Outcome]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """How many of each, by place, and the faults."""
    table: dict[str, dict[str, int]] = {}
    faults = []
    for one in outcomes:
        row = table.setdefault(one.place, {})
        verdict = "FAULT" if one.fault else one.verdict
        row[verdict] = row.get(verdict, 0) + 1
        if one.fault:
            faults.append(f"{one.place}: {one.fault}")
    return dict(sorted(table.items())), faults


def flipped(outcomes: Iterable[Outcome]) -> int:
    """How many bits were flipped."""
    return sum(one.verdict != PASSED for one in outcomes)


def lines(results: dict[str, Any]) -> list[str]:
    """The table for people."""
    told = []
    for place, row in results["places"].items():
        for verdict, count in row.items():
            told.append(f"{count:>7}  {place}: {verdict}")
    told.append(f"{results['count']:>7}  in all, {len(results['faults'])} faults")
    return [*told, *(f"FAULT  {fault}" for fault in results["faults"][:20])]
