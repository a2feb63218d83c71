"""Figures of a peer beside those of another, round by round."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.peers.limits import LIMITS
from bench.peers.rotation import Row
from bench.timing import Spread, spread

Figures = dict[str, Any]
Rounds = dict[Any, Figures]  # by the round's number, or what else tells one from another


def select(rows: Iterable[Row], workload: str, peer: str, loop: str = "") -> Rounds:
    """The figures of one peer by round, without those that failed.

    Beside a loop, those of each save that a round's process made.
    """
    wanted = (workload, peer, loop)
    return {
        (row["round"], at) if loop else row["round"]: figures
        for row in rows
        if (row["workload"], row["peer"], row["loop"]) == wanted and not row["failure"]
        for at, figures in enumerate(row["figures"].get("saves", [row["figures"]]))
    }


def figure(rounds: Rounds, name: str) -> Spread | None:
    """Least, median and most over the rounds, if there are any."""
    values = [figures[name] for figures in rounds.values() if name in figures]
    return spread(values) if values else None


def paired(rounds: Rounds, name: str, base: Rounds, base_name: str) -> Spread | None:
    """The spread of ratios, each of two figures of one round; none if no round has both."""
    both = [at for at in rounds if at in base and name in rounds[at] and base_name in base[at]]
    ratios = [rounds[at][name] / base[at][base_name] for at in both]
    return spread(ratios) if ratios else None


def rival(rows: Sequence[Row], workload: str, rivals: Sequence[str]) -> str:
    """The first of `rivals` that was measured, or nothing."""
    return next((name for name in rivals if select(rows, workload, name)), "")


def limits(rows: Iterable[Row], workload: str) -> Rounds:
    """The machine's limits by round."""
    return select(rows, workload, LIMITS)
