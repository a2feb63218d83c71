"""A large tensor in parts, of bounded size each."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gpuckpt.boxes import Box, Shape


def slabs(shape: Shape, most: int) -> Iterator[Box]:
    """Boxes of at most so many elements that are all of a tensor, in C order."""
    yield from _slabs((), shape, max(most, 1))


def _slabs(at: Shape, shape: Shape, most: int) -> Iterator[Box]:
    """Those at the first indices `at`, of which each fixes one axis."""
    fixed = (1,) * len(at)
    if not shape or math.prod(shape) <= most:
        if math.prod(shape):
            yield Box((*at, *(0,) * len(shape)), (*fixed, *shape))
        return
    row = math.prod(shape[1:])
    if row > most:
        for index in range(shape[0]):
            yield from _slabs((*at, index), shape[1:], most)
        return
    step = max(most // row, 1)
    for index in range(0, shape[0], step):
        rows = min(step, shape[0] - index)
        yield Box((*at, index, *(0,) * (len(shape) - 1)), (*fixed, rows, *shape[1:]))
