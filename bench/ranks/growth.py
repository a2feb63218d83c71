"""How a figure grows with the number of ranks: its exponent."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

# Of as many points with the most ranks: with few of them, what is fixed hides what grows.
LAST = 3


def exponent(points: Iterable[tuple[float, float]]) -> float | None:
    """The k by which the last points go as ranks to the k, by logarithms; None of less than two.

    Points are ranks and figures; a figure of 0 tells nothing.
    """
    known = sorted((ranks, figure) for ranks, figure in points if figure > 0)[-LAST:]
    if len({ranks for ranks, _ in known}) < 2:
        return None
    ranks, figures = np.log(np.array(known, float)).T
    return float(np.polyfit(ranks, figures, 1)[0])
