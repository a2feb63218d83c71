"""Sums of squares of elements of one or two bytes, always added in one order.

Two bytes are a code: a float16, a bfloat16, or two elements of one byte.  Code
i belongs to lane i % 256.  In each lane the squares of 16 codes are added in
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

from gpuckpt.native import HALF, LANES, NARROW, WIDE, native_for

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.uint16]
Singles = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_ROWS = 16
_BLOCK = LANES * _ROWS
# Codes done at a time: what they become stays in a core's cache.
_MOST = 8 * _BLOCK


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


def half_squares(raw: Bytes, table: Callable[[], Singles], *, swapped: bool = False) -> float:
    """The sum of the squares of float16s, big-endian if `swapped`: infinite or NaN if one is.

    `table()` are the squares of all, float32[65536].
    """
    loops = None if swapped else native_for(1, raw)
    if loops:
        return float(loops.squares(raw, HALF).sum())
    return squares_by_table(_codes(raw, swapped=swapped), table())


def narrow_squares(raw: Bytes, table: Callable[[], Singles], narrow: Narrow) -> float:
    """The sum of the squares of one-byte floats: infinite or NaN if one is.

    `table()` are the sums of two, float32[65536].
    """
    if loops := native_for(1, raw):
        known = narrow.mask, narrow.shift, narrow.top, narrow.odd
        return float(loops.squares(raw, NARROW, known).sum()) * narrow.scale
    whole = raw if raw.size % 2 == 0 else np.append(raw, np.uint8(0))
    return squares_by_table(_codes(whole), table())


def wide_squares(raw: Bytes, *, swapped: bool = False) -> float:
    """The sum of the squares of bfloat16s, big-endian if `swapped`, each rounded to float32."""
    loops = None if swapped else native_for(1, raw)
    if loops:
        return float(loops.squares(raw, WIDE).sum())
    return squares_by_shift(_codes(raw, swapped=swapped))


def squares_by_table(codes: Codes, table: Singles) -> float:
    """The sum of what a table, float32[65536], has for each code."""
    positions = np.empty(min(codes.size, _MOST), np.intp)

    def look_up(some: Codes, found: Singles) -> None:
        positions[: some.size] = some
        table.take(positions[: some.size], out=found, mode="wrap")  # "raise" would copy

    return _sum(codes, look_up)


def squares_by_shift(codes: Codes) -> float:
    """The sum of the squares of bfloat16s."""

    def square(some: Codes, found: Singles) -> None:
        bits = found.view(np.uint32)
        bits[...] = some
        np.left_shift(bits, 16, out=bits)
        np.multiply(found, found, out=found)

    return _sum(codes, square)


def _codes(raw: Bytes, *, swapped: bool = False) -> Codes:
    codes: Any = raw.view(">u2" if swapped else "<u2")
    return codes  # type: ignore[no-any-return]


def _sum(codes: Codes, squares_of: Callable[[Codes, Singles], None]) -> float:
    """The sum over all codes, of each of which `squares_of` writes one square."""
    lanes: Doubles = np.zeros(LANES)
    found = np.empty(-(-min(codes.size, _MOST) // _BLOCK) * _BLOCK, np.float32)
    for at in range(0, codes.size, _MOST):
        some = codes[at : at + _MOST]
        blocks = -(-some.size // _BLOCK)
        squares_of(some, found[: some.size])
        found[some.size : blocks * _BLOCK] = 0
        rows = found[: blocks * _BLOCK].reshape(blocks, _ROWS, LANES)
        sums = np.empty((blocks + 1, LANES))
        sums[0], sums[1:] = lanes, np.add.reduce(rows, axis=1)
        lanes = np.add.reduce(sums, axis=0)
    return float(lanes.sum())
