"""Tables of strided runs for the kernels `gather_runs` and `scatter_runs`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

AXES_MAX = 32
PIECE_NBYTES = 16384
ITEM_NBYTES_MAX = 16
# A row of the kernels' table: `struct Run` of kernels/strided.cuh, byte for byte.
RUN = np.dtype(
    [
        *((name, "<u8") for name in ("tensor", "packed", "start", "count", "first_piece")),
        ("shape", "<u8", AXES_MAX),
        ("strides", "<i8", AXES_MAX),
        *((name, "<u4") for name in ("itemsize", "axes")),
    ]
)

Axes = tuple[tuple[int, int], ...]


class Run(NamedTuple):
    """Bytes `start` … `start + nbytes` of a tensor in C order, to be packed or put back.

    `tensor` is the address of element [0, …, 0], `packed` that of the run's
    packed bytes; `strides` are bytes, and may be 0 or negative.
    """

    tensor: int
    shape: Sequence[int]
    strides: Sequence[int]
    itemsize: int
    packed: int
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Runs:
    """A table of runs (`RUN`), and how many pieces of work they are: `gather_runs`' arguments."""

    rows: npt.NDArray[Any]
    pieces: int


def lay_out_runs(runs: Sequence[Run]) -> Runs:
    """Make a table of runs, of whole elements of any size at any addresses.

    Axes that lie dense one after the other become one, and items as large as
    every address and stride allows; `AXES_MAX` axes must remain at most.
    """
    rows, pieces = np.zeros(len(runs), RUN), 0
    for row, run in zip(rows, runs, strict=True):
        assert run.start % run.itemsize == run.nbytes % run.itemsize == 0, "an element is cut"
        assert run.start + run.nbytes <= math.prod(run.shape) * run.itemsize, run
        axes = merged(run.shape, run.strides, run.itemsize)
        size = _item_nbytes(axes, run)
        axes = _in_items(axes, size)
        assert len(axes) <= AXES_MAX, run.shape
        row["tensor"], row["packed"], row["first_piece"] = run.tensor, run.packed, pieces
        row["start"], row["count"] = run.start // size, run.nbytes // size
        row["itemsize"], row["axes"] = size, len(axes)
        row["shape"][: len(axes)] = [extent for extent, _ in axes]
        row["strides"][: len(axes)] = [stride for _, stride in axes]
        pieces += -(-run.nbytes // PIECE_NBYTES)
    return Runs(rows, pieces)


def merged(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> Axes:
    """Axes of bytes: (extent, stride) of each, the last one dense, none that could be one."""
    axes = [(itemsize, 1)]
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        inner, step = axes[-1]
        if stride == inner * step and extent != 1:
            axes[-1] = (inner * extent, step)
        elif extent != 1:
            axes.append((extent, stride))
    return tuple(reversed(axes))


def _item_nbytes(axes: Axes, run: Run) -> int:
    """The largest power of two, 16 at most, that divides all that a run's items must be."""
    numbers = [run.tensor, run.packed, run.start, run.nbytes, axes[-1][0]]
    numbers += [stride for _, stride in axes[:-1]]
    return math.gcd(ITEM_NBYTES_MAX, *numbers)


def _in_items(axes: Axes, size: int) -> Axes:
    """Axes of items of `size` bytes, out of those of bytes."""
    last = axes[-1][0] // size
    return (*axes[:-1], (last, size)) if last > 1 else axes[:-1]
