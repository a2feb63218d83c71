"""Statistics of tensors: how many NaNs and infinities, and the sum of squares of all else.

A save reads every byte anyway, so it counts while it does.  This is the
reference; a GPU's kernels count the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuckpt.dtypes import to_numpy
from gpuckpt.native import HALF, NARROW, NONE, SINGLE, WIDE, Squares
from gpuckpt.record import record
from gpuckpt.squares import Narrow, half_squares, narrow_of, narrow_squares, wide_squares

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating[Any]]

# Elements converted at a time: 256 KiB of float32, which stay in a core's cache.
_BLOCK = 1 << 16
# Elements summed in float32 before float64 goes on: few, so that rounding stays below 1e-6.
_ROW = 128
# In float32 a square loses up to 2**-126, and a mean square above this hardly feels it.
_LEAST_MEAN = 2.0**-104
_NOTHING: Squares = (NONE, (0, 0, 0, 256))
# Not more elements than this are summed in float64 at once.
_FEW = 1 << 12
_KINDS = {
    "float16": 1,
    "bfloat16": 2,
    **dict.fromkeys(("float32", "complex64"), 3),
    **dict.fromkeys(("float64", "complex128"), 4),
}
# One-byte floats by the beginnings of their names, and the bits that each kind has.
_ONE_BYTE = {"float8": 8, "float6": 6, "float4": 4}


@record(frozen=True, slots=True)
class Statistics:
    """NaNs, infinities, and the sum of squares of the finite elements.

    A complex number counts as two elements.  The sum is infinite if float64
    can't hold it.
    """

    nans: int = 0
    infs: int = 0
    squares: float = 0.0

    @property
    def norm(self) -> float:
        """The Euclidean norm of the finite elements."""
        return math.sqrt(self.squares)

    @property
    def not_finite(self) -> str:
        """What isn't finite, for people: `12 NaN, 3 inf`, or nothing."""
        counts = {"NaN": self.nans, "inf": self.infs}
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count)

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.nans + other.nans, self.infs + other.infs, self.squares + other.squares
        )


def statistics_of(raw: Bytes, dtype: str) -> Statistics | None:
    """Statistics of a chunk, or None if `dtype` (a name of `dtypes`) isn't a float type.

    `raw` is uint8, contiguous, of any whole number of elements, at any
    address.  The counts are exact, and `squares` within 1e-6 of the exact sum
    (of float64, as far as float64 can hold the squares).  Holds the GIL for
    moments only, and takes less than 600 KiB.  Where there are no compiled loops,
    a table of 256 KiB is kept for each type but bfloat16 that is of one or two
    bytes, and was met.
    """
    plain = dtype.removeprefix(">")
    if not kind_of(plain):
        return None
    with np.errstate(all="ignore"):  # a signalling NaN is no error here
        return _statistics(raw, dtype, _sum_of_squares(_elements(raw, dtype), plain))


def statistics_with(raw: Bytes, dtype: str, squares: float) -> Statistics | None:
    """As `statistics_of`, where a sum is known that the compiled loops made."""
    if kind_of(dtype) == WIDE and squares < _LEAST_MEAN * (raw.size // 2):
        return statistics_of(raw, dtype)
    return _statistics(raw, dtype, squares)


def _statistics(raw: Bytes, dtype: str, squares: float) -> Statistics:
    """Where the sum of squares is known: not finite if an element isn't."""
    if math.isfinite(squares):
        return Statistics(squares=squares)
    elements, plain = _elements(raw, dtype), dtype.removeprefix(">")
    with np.errstate(all="ignore"):
        if kind_of(plain) == 5:
            return _count_bytes(elements, plain)
        return sum(map(_classify, _blocks(elements, plain, _BLOCK // 4)), Statistics())


def squares_in_loops(raw: Bytes, dtype: str) -> tuple[Squares, float]:
    """How `Native.look` reads a chunk's elements, and what its sum is to be multiplied by.

    The kind is `NONE` if it doesn't: `statistics_of` does it then.
    """
    if kind_of(dtype) == WIDE and not _suit_float32(_elements(raw, dtype)):
        return _NOTHING, 1.0
    return _in_loops(dtype)


@cache
def _in_loops(dtype: str) -> tuple[Squares, float]:
    kind = kind_of(dtype)
    if kind in (HALF, WIDE, SINGLE):
        return (kind, (0, 0, 0, 256)), 1.0
    narrow = _narrow(dtype) if kind == NARROW else None
    if narrow is None:
        return _NOTHING, 1.0
    return (NARROW, (narrow.mask, narrow.shift, narrow.top, narrow.odd)), narrow.scale


@cache
def kind_of(dtype: str) -> int:
    """How a GPU reads elements of this type when it counts.

    0: not at all, 1: float16, 2: bfloat16, 3: float32 (and complex64),
    4: float64 (and complex128), 5: by `byte_values`.  It reads no big-endian
    ones, which are 0.
    """
    return 5 if dtype[:6] in _ONE_BYTE and dtype[6:7] == "_" else _KINDS.get(dtype, 0)


@cache
def byte_values(dtype: str) -> npt.NDArray[np.float32] | None:
    """What each byte is worth in a one-byte float type: float32[256], read-only; else None."""
    if kind_of(dtype) != 5:
        return None
    bits = np.arange(256, dtype=np.uint8) & np.uint8(2 ** _ONE_BYTE[dtype[:6]] - 1)
    with np.errstate(all="ignore"):
        values: npt.NDArray[np.float32] = bits.view(to_numpy(dtype)).astype(np.float32)
    values.flags.writeable = False
    return values


def _elements(raw: Bytes, dtype: str) -> npt.NDArray[Any]:
    """A chunk's floats; of complex numbers their parts, of one-byte floats the bytes."""
    plain = dtype.removeprefix(">")
    if kind_of(plain) == 5:
        return raw
    parts = to_numpy({"complex64": "float32", "complex128": "float64"}.get(plain, plain))
    return raw.view(parts if plain == dtype else parts.newbyteorder(">"))


def _sum_of_squares(elements: npt.NDArray[Any], dtype: str) -> float:
    """The sum of squares; infinite or NaN if an element is, and perhaps if a square is."""
    kind = kind_of(dtype)
    if kind == 1:
        return half_squares(elements, lambda: _square_table(dtype))
    if kind == 5:
        narrow = _narrow(dtype)
        return (
            narrow_squares(elements, lambda: _square_table(dtype), narrow) if narrow else math.nan
        )
    if kind != 4 and elements.size > _FEW and _suit_float32(elements):
        squares = wide_squares(elements) if kind == 2 else _squares_by_rows(elements)
        if not squares < _LEAST_MEAN * elements.size:
            return squares
    blocks = _blocks(elements, dtype, _BLOCK) if kind == 2 else [elements]
    return sum(float(np.einsum("i,i->", some, some, dtype=np.float64)) for some in blocks)


def _suit_float32(elements: npt.NDArray[Any]) -> bool:
    """Whether squares aren't too small for it, as far as a sample shows.

    Products that are subnormal take a CPU fifty times as long.
    """
    with np.errstate(all="ignore"):  # a signalling NaN is no error here
        some = elements[:: max(elements.size // 256, 1)].astype(np.float64)
    return not np.einsum("i,i->", some, some) < _LEAST_MEAN * some.size


def _squares_by_rows(elements: Floats) -> float:
    """The sum of squares of float32: too small, infinite or NaN where float32's are."""
    whole = elements.size - elements.size % _ROW
    rows, rest = elements[:whole].reshape(-1, _ROW), elements[whole:]
    squares = float(np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64))
    return squares + float(np.einsum("i,i->", rest, rest)) if rest.size else squares


@cache
def _square_table(dtype: str) -> npt.NDArray[np.float32]:
    """The squares of all float16; or, of one-byte floats, the sum of the two of each pair.

    numpy takes long to convert float16, and much longer if they are subnormal.
    """
    if kind_of(dtype) == 1:
        halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
        return np.square(halves, dtype=np.float32)
    squares = np.square(_values_of(dtype))
    return np.add.outer(squares, squares).ravel()


@cache
def _narrow(dtype: str) -> Narrow | None:
    """How a one-byte float type is read; None of one without a sign, whose squares are too wide."""
    _, _, rest = dtype.partition("m")
    if rest.startswith("0"):
        return None
    return narrow_of(_values_of(dtype), _ONE_BYTE[dtype[:6]], int(rest[0]))


def _values_of(dtype: str) -> npt.NDArray[np.float32]:
    values = byte_values(dtype)
    assert values is not None, dtype
    return values


def _count_bytes(elements: Bytes, dtype: str) -> Statistics:
    """The statistics of one-byte floats, from how often each byte occurs."""
    counts = np.zeros(256, np.int64)
    for at in range(0, elements.size, _BLOCK // 2):
        counts += np.bincount(elements[at : at + _BLOCK // 2], minlength=256)
    values = _values_of(dtype).astype(np.float64)
    finite, nan = np.isfinite(values), np.isnan(values)
    squares = float(counts[finite] @ np.square(values[finite]))
    return Statistics(int(counts[nan].sum()), int(counts[~finite & ~nan].sum()), squares)


def _classify(elements: Floats) -> Statistics:
    """The statistics of a few elements, looking at each."""
    finite = np.isfinite(elements)
    others = elements.size - int(np.count_nonzero(finite))
    nans = int(np.count_nonzero(np.isnan(elements))) if others else 0
    if others:
        elements = np.where(finite, elements, np.zeros((), elements.dtype))
    squares = float(np.einsum("i,i->", elements, elements, dtype=np.float64))
    return Statistics(nans, others - nans, squares)


def _blocks(elements: npt.NDArray[Any], dtype: str, most: int) -> Iterator[Floats]:
    """The elements as native float32 or float64, `most` at a time, each until the next."""
    wide = np.dtype(np.float64 if kind_of(dtype) == 4 else np.float32)
    room: Floats = np.empty(0 if elements.dtype == wide else min(most, elements.size), wide)
    for at in range(0, elements.size, most):
        block: npt.NDArray[Any] = elements[at : at + most]
        if elements.dtype != wide:
            room[: block.size] = block
            block = room[: block.size]
        yield block
