"""Differences of a chunk from its base, element by element, and back.

An element counts as a little-endian unsigned integer of `width` bytes.  The
difference is modular, and its sign is folded into its lowest bit, so that
small differences of either sign are small numbers: 0, -1, 1, -2 → 0, 1, 2, 3.

By the compiled loops where they are, else by numpy.  numpy's version is the
reference: whatever else does it gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuckpt.native import native_for
from gpuckpt.planes import join_by_numpy

Bytes = npt.NDArray[np.uint8]
Elements = npt.NDArray[np.unsignedinteger[Any]]

WIDTHS = (1, 2, 4, 8)
# Bytes done at a time: they stay in a core's cache.
_BLOCK = 1 << 16


def delta(cur: Bytes, base: Bytes, width: int, out: Bytes) -> None:
    """Write the folded differences of `cur` from `base`: uint8[n·width] each, contiguous.

    At any address.  `out` may be `cur` or `base`, but not overlap them otherwise.
    """
    _check(cur, base, width, out)
    if loops := native_for(width, cur, base, out):
        loops.delta(cur, base, width, out)
    else:
        delta_by_numpy(cur, base, width, out)


def undelta(zigzag: Bytes, base: Bytes, width: int, out: Bytes) -> None:
    """Add folded differences to their base: undoes `delta`.

    At any address.  `out` may be `zigzag` or `base`, but not overlap them otherwise.
    """
    _check(zigzag, base, width, out)
    if loops := native_for(width, zigzag, base, out):
        loops.undelta(zigzag, base, width, out)
    else:
        undelta_by_numpy(zigzag, base, width, out)


def delta_split(cur: Bytes, base: Bytes, width: int, out: Bytes) -> list[Bytes]:
    """The planes of what `delta` gives: `width` of uint8[n], in `out`, which overlaps nothing."""
    room = out[: cur.size]
    _check(cur, base, width, room)
    if loops := native_for(width, cur, base, room):
        loops.delta_split(cur, base, width, room)
    else:
        delta_split_by_numpy(cur, base, width, room)
    return list(room.reshape(width, -1))


def join_undelta(planes: Sequence[Bytes], base: Bytes, width: int, out: Bytes) -> None:
    """Join planes of folded differences and add them to their base: undoes `delta_split`.

    `planes` are `width` of uint8[n]; `out` may be `base`, but not overlap it otherwise.
    """
    assert len(planes) == width, (len(planes), width)
    assert all(plane.size * width == out.size for plane in planes), (out.size, width)
    _check(out, base, width, out)
    if loops := native_for(width, out, base, *planes):
        loops.join_undelta(planes, base, width, out)
    else:
        join_undelta_by_numpy(planes, base, width, out)


def delta_by_numpy(cur: Bytes, base: Bytes, width: int, out: Bytes) -> None:
    """What `delta` does."""
    top = 8 * width - 1
    for now, before, difference in _blocks(width, cur, base, out):
        np.subtract(now, before, out=difference)
        sign = difference >> top
        np.negative(sign, out=sign)
        np.left_shift(difference, 1, out=difference)
        np.bitwise_xor(difference, sign, out=difference)


def undelta_by_numpy(zigzag: Bytes, base: Bytes, width: int, out: Bytes) -> None:
    """What `undelta` does."""
    for folded, before, whole in _blocks(width, zigzag, base, out):
        sign = folded & 1
        np.negative(sign, out=sign)
        np.bitwise_xor(sign, folded >> 1, out=sign)
        np.add(sign, before, out=whole)


def delta_split_by_numpy(cur: Bytes, base: Bytes, width: int, out: Bytes) -> None:
    """What `delta_split` does; `out` has `cur`'s size."""
    folded = np.empty(min(_BLOCK, cur.size), np.uint8)
    planes = out.reshape(width, -1)
    for at in range(0, cur.size, _BLOCK):
        end = min(at + _BLOCK, cur.size)
        some = folded[: end - at]
        delta_by_numpy(cur[at:end], base[at:end], width, some)
        planes[:, at // width : end // width] = some.reshape(-1, width).T


def join_undelta_by_numpy(planes: Sequence[Bytes], base: Bytes, width: int, out: Bytes) -> None:
    """What `join_undelta` does."""
    folded = np.empty(min(_BLOCK, out.size), np.uint8)
    for at in range(0, out.size, _BLOCK):
        end = min(at + _BLOCK, out.size)
        some = folded[: end - at]
        join_by_numpy([plane[at // width : end // width] for plane in planes], some)
        undelta_by_numpy(some, base[at:end], width, out[at:end])


def _check(one: Bytes, other: Bytes, width: int, out: Bytes) -> None:
    assert width in WIDTHS, width
    assert one.size == other.size == out.size, (one.size, other.size, out.size)
    assert not one.size % width, (one.size, width)


def _blocks(width: int, *arrays: Bytes) -> Iterator[list[Elements]]:
    """The elements of several arrays, some at a time."""
    kind = np.dtype(f"<u{width}")
    for at in range(0, arrays[0].size, _BLOCK):
        yield [array[at : at + _BLOCK].view(kind) for array in arrays]
