"""Boxes that several ranks hold alike, cut so that each of them writes about as many bytes.

The boxes are put in a line, and the line is cut once for each rank: so there
are as many pieces as boxes and ranks together, at most, and not as many as
there are of the one for each of the other.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

from gpuckpt.boxes import Box

# A piece of a box has so many elements, or more.
PIECE_COUNT = 16 << 10


def spread(
    boxes: Sequence[Box], item_nbytes: Sequence[int], loads: Sequence[int]
) -> list[list[tuple[int, Box]]]:
    """The pieces that each of `len(loads)` ranks writes, each with the position of its box.

    Boxes have elements, of so many bytes each.  `loads` are bytes that ranks
    write besides: who has less of them writes more of these.
    """
    nbytes = [box.count * item for box, item in zip(boxes, item_nbytes, strict=True)]
    ends = list(itertools.accumulate(_quotas(loads, sum(nbytes))))
    found: list[list[tuple[int, Box]]] = [[] for _ in loads]
    at = 0
    for position, (box, size) in enumerate(zip(boxes, nbytes, strict=True)):
        for rank, piece in _pieces(box, [(end - at) / size for end in _near(ends, at, size)]):
            found[bisect.bisect_right(ends, at) + rank].append((position, piece))
        at += size
    return found


def _near(ends: Sequence[int], at: int, size: int) -> Sequence[int]:
    """Those of the line's cuts that are in its next `size` bytes."""
    return ends[bisect.bisect_right(ends, at) : bisect.bisect_left(ends, at + size)]


def _pieces(box: Box, cuts: Sequence[float]) -> list[tuple[int, Box]]:
    """A box, cut near some places from 0 to 1, and the position of each piece that is not empty.

    It is cut along its first axis that has more than one index, and nowhere if
    pieces were too small.
    """
    axis = next((at for at, extent in enumerate(box.shape) if extent > 1), 0)
    extent = box.shape[axis]
    unit = min(-(-PIECE_COUNT * extent // box.count), extent)
    edges = [0, *(round(cut * extent / unit) * unit for cut in cuts), extent]
    edges = [edge if extent - edge >= unit else extent for edge in edges]
    pieces = []
    for at, (first, last) in enumerate(itertools.pairwise(edges)):
        if first < last:
            offset, shape = list(box.offset), list(box.shape)
            offset[axis], shape[axis] = offset[axis] + first, last - first
            pieces.append((at, Box(tuple(offset), tuple(shape))))
    return pieces


def _quotas(loads: Sequence[int], nbytes: int) -> list[int]:
    """What each takes of so many bytes, so that its load comes as near as can be to the others'."""
    order = sorted(range(len(loads)), key=lambda rank: loads[rank])
    total, count = nbytes, 0  # what the lowest have then, together, and how many they are
    for count, rank in enumerate(order):
        if count and total <= loads[rank] * count:
            break
        total += loads[rank]
    else:
        count = len(order)
    level, more = divmod(total, count)
    quotas = [0] * len(loads)
    for at, rank in enumerate(order[:count]):
        quotas[rank] = level + (at < more) - loads[rank]
    return quotas
