"""Sums of squares of elements of one or two bytes, always added in one order.

Two bytes are a code: a float16, a bfloat16, or two elements of one byte.  Code
i belongs to lane i % 1024.  In each lane the squares of 16 codes are added in
float32, one after the other, which loses less than 6e-7 of them, and these
sums in float64, one after the other.  At the end numpy adds up the lanes.

By the compiled loops where they are, else by numpy.  numpy's version is the
reference: whatever else adds gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuckpt.native import HALF, LANES, NARROW, WIDE, Native, native_for

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.uint16]
Singles = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]

_CODE = np.dtype(np.uint16)
_ROWS = 16
# Codes done at a time: what they become stays in a core's cache.
_MOST = 2 * _ROWS * LANES


@dataclass(frozen=True, slots=True)
class Narrow:
    """How bytes are like float16s: bits in `mask`, shifted left, are one but for sign and scale.

    Magnitudes above `top`, and the byte `odd` (256: none), are infinite or
    NaN.  `scale` is what a float16's square is to be multiplied by.
    """

    mask: int
    shift: int
    top: int
    odd: int
    scale: float


def narrow_of(values: Singles, bits: int, mantissa: int) -> Narrow:
    """What is to be known of a one-byte type with a sign, from what its bytes are worth.

    `values` are float32[256]; `bits` the bits that count, sign included, of
    which `mantissa` are the mantissa's.
    """
    mask, shift = 2 ** (bits - 1) - 1, 10 - mantissa
    strange = np.flatnonzero(~np.isfinite(values[: mask + 1]))
    top = int(strange[0]) - 1 if strange.size else mask
    odd = 256 if np.isfinite(values[0x80]) else 0x80
    return Narrow(mask, shift, top, odd, (float(values[1]) / 2.0 ** (shift - 24)) ** 2)


def half_squares(elements: Halves, table: Callable[[], Singles]) -> float:
    """The sum of the squares of float16s of any byte order: infinite or NaN if one is.

    `table()` are the squares of all, float32[65536].
    """
    if loops := _loops_for(elements):
        return float(loops.squares(elements.view(np.uint8), HALF).sum())
    return squares_by_table(elements.view(_CODE.newbyteorder(elements.dtype.byteorder)), table())


def narrow_squares(raw: Bytes, table: Callable[[], Singles], narrow: Narrow) -> float:
    """The sum of the squares of one-byte floats: infinite or NaN if one is.

    `table()` are the sums of two, float32[65536].
    """
    if loops := native_for(1, raw):
        known = narrow.mask, narrow.shift, narrow.top, narrow.odd
        return float(loops.squares(raw, NARROW, known).sum()) * narrow.scale
    whole = raw if raw.size % 2 == 0 else np.append(raw, np.uint8(0))
    return squares_by_table(whole.view(_CODE), table())


def wide_squares(elements: npt.NDArray[Any]) -> float:
    """The sum of the squares of bfloat16s of any byte order, each rounded to float32."""
    if loops := _loops_for(elements):
        return float(loops.squares(elements.view(np.uint8), WIDE).sum())
    return squares_by_rounding(elements)


def squares_by_table(codes: Codes, table: Singles) -> float:
    """The sum of what a table, float32[65536], has for each code."""
    positions = np.empty(min(codes.size, _MOST), np.intp)

    def look_up(some: Codes, found: Singles) -> None:
        positions[: some.size] = some
        table.take(positions[: some.size], out=found, mode="wrap")  # "raise" would copy

    return _sum(codes, look_up)


def squares_by_rounding(elements: npt.NDArray[Any]) -> float:
    """The sum of the squares of floats, each rounded to float32."""

    def square(some: npt.NDArray[Any], found: Singles) -> None:
        found[...] = some
        np.multiply(found, found, out=found)

    return _sum(elements, square)


def _loops_for(elements: npt.NDArray[Any]) -> Native | None:
    return native_for(1, elements) if elements.dtype.isnative else None


def _sum(codes: npt.NDArray[Any], squares_of: Callable[[npt.NDArray[Any], Singles], None]) -> float:
    """The sum over all codes, of each of which `squares_of` writes one square."""
    lanes = np.zeros(LANES)
    found = np.empty(-(-min(codes.size, _MOST) // LANES) * LANES, np.float32)
    for at in range(0, codes.size, _MOST):
        some = codes[at : at + _MOST]
        squares_of(some, found[: some.size])
        whole = -(-some.size // LANES) * LANES
        found[some.size : whole] = 0
        rows = found[:whole].reshape(-1, LANES)
        for row in range(0, len(rows), _ROWS):
            lanes += np.add.reduce(rows[row : row + _ROWS], axis=0)
    return float(lanes.sum())
