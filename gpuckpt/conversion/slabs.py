"""A tensor's bytes in C order, box by box."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from gpuckpt.boxes import Box, Shape


def slabs(shape: Shape, item_nbytes: int, most_nbytes: int) -> Iterator[Box]:
    """Boxes of at most so many bytes that follow each other in C order, all of a tensor.

    One element at least; none of a tensor without any.
    """
    if not math.prod(shape):
        return
    axis = 0
    while axis < len(shape) and math.prod(shape[axis + 1 :]) * item_nbytes > most_nbytes:
        axis += 1
    if axis >= len(shape):  # elements one by one, or the only one
        for at in itertools.product(*map(range, shape)):
            yield Box(at, (1,) * len(shape))
        return
    rest = shape[axis + 1 :]
    step = max(most_nbytes // (math.prod(rest) * item_nbytes), 1)
    for before in itertools.product(*map(range, shape[:axis])):
        for first in range(0, shape[axis], step):
            offset = (*before, first, *(0 for _ in rest))
            count = min(step, shape[axis] - first)
            yield Box(offset, (*(1 for _ in before), count, *rest))
