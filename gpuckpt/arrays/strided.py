"""Runs of bytes, in C order, of arrays that lie in memory in any order."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def gather(array: npt.NDArray[np.generic], start: int, out: Bytes) -> None:
    """Copy bytes `start` … `start + out.size` of `array`, as if it were in C order, to `out`.

    Whole elements only.  Touches nothing beyond `out`, so that the copy of a
    chunk costs a chunk's memory however large and scattered the array is.
    """
    _run(array, start, out, into=False)


def scatter(data: Bytes, array: npt.NDArray[np.generic], start: int) -> None:
    """Copy `data` to bytes `start` … of `array`, as if it were in C order: undoes `gather`."""
    _run(array, start, data, into=True)


def _run(array: npt.NDArray[np.generic], start: int, flat: Bytes, *, into: bool) -> None:
    if not flat.size:
        return
    if array.ndim == 0:
        array = array.reshape(1)
    row_nbytes = math.prod(array.shape[1:]) * array.itemsize
    first, within = divmod(start, row_nbytes)
    done = 0
    if within:  # the rest of a row that begins before `start`
        done = min(row_nbytes - within, flat.size)
        _run(array[first], within, flat[:done], into=into)
        first += 1
    rows = (flat.size - done) // row_nbytes
    if rows:
        nbytes = rows * row_nbytes
        block = array[first : first + rows]
        packed = flat[done : done + nbytes].view(array.dtype).reshape(block.shape)
        if into:
            block[...] = packed
        else:
            packed[...] = block
        done += nbytes
    if done < flat.size:  # the beginning of a row that ends after the run
        _run(array[first + rows], 0, flat[done:], into=into)
