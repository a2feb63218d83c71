"""Pure arithmetic: runs of a tensor's elements in C order, and boxes of it.

A chunk is such a run, and what a rank wants of a tensor is a box.  What both
have in common is one run of the box's own elements, in its C order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from gpuckpt.boxes import Box, Shape

Bytes = npt.NDArray[np.uint8]


def before(shape: Shape, box: Box, number: int) -> int:
    """How many elements of `box` come before the element with this number, in C order.

    Elements of a tensor of `shape` are numbered from 0; a number beyond the
    last counts all.
    """
    if number >= math.prod(shape):
        return box.count
    found, rows, each = 0, math.prod(shape), box.count
    for extent, first, count in zip(shape, box.offset, box.shape, strict=True):
        rows, each = rows // extent, each // count if count else 0
        at, number = divmod(number, rows)
        found += min(max(at - first, 0), count) * each
        if not first <= at < first + count:
            break
    return found


def boxes_of(shape: Shape, first: int, last: int) -> Iterator[Box]:
    """The boxes that elements `first` … `last - 1` consist of, in C order.

    They are fewer than twice the number of axes.
    """
    if first >= last:
        return
    if not shape:
        yield Box((), ())
        return
    row = math.prod(shape[1:])
    at, within = divmod(first, row)
    if within:  # the rest of a row that begins before
        end = min(row, within + last - first)
        yield from _below(at, boxes_of(shape[1:], within, end))
        first, at = first + end - within, at + 1
    rows = (last - first) // row
    if rows:
        yield Box((at, *(0 for _ in shape[1:])), (rows, *shape[1:]))
    yield from _below(at + rows, boxes_of(shape[1:], 0, last - first - rows * row))


def _below(at: int, boxes: Iterator[Box]) -> Iterator[Box]:
    """Boxes of one row, as boxes of the whole."""
    for box in boxes:
        yield Box((at, *box.offset), (1, *box.shape))


def pick(run: Bytes, first: int, shape: Shape, box: Box, out: Bytes, *, item_nbytes: int) -> None:
    """Copy those elements of a run that a box has to `out`, in C order.

    `run` has the bytes of a tensor's elements from number `first` on, `out`
    room for exactly those of them that are in the box.
    """
    at = done = 0
    for block in boxes_of(shape, first, first + run.size // item_nbytes):
        end = at + block.count * item_nbytes
        common = block & box
        if common is not None:
            rows = run[at:end].reshape(*block.shape, item_nbytes)
            room = out[done : done + common.count * item_nbytes]
            room.reshape(*common.shape, item_nbytes)[...] = rows[common.inside(block).slices]
            done += room.size
        at = end
