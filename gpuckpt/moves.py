"""By how much numbers moved between two arrays of the same elements, and which of their bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gpuckpt.dtypes import to_numpy

Bytes = npt.NDArray[np.uint8]
_Array = npt.NDArray[Any]

# Numbers compared at a time: 512 KiB of float64, which stay in a core's cache.
_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class Moved:
    """What two arrays differ by; those of two parts of a tensor can be added.

    A complex number counts as two.  Of `count` numbers, `changed` have other
    bits; `bytes_changed` says of how many the lowest, the second, … byte is
    another, and `signs`, `exponents` and `mantissas` of how many floats that
    part is (zeros for other types).  `largest` is the largest absolute difference, and
    `squares` the sum of the squares of all, over those numbers that are finite
    on both sides; of these `before` and `after` are the sums of squares.  `broken`
    were finite and aren't any more, `mended` weren't and are.  Of elements that
    are no numbers (`numeric` is false) only bits are compared.
    """

    count: int = 0
    changed: int = 0
    bytes_changed: tuple[int, ...] = ()
    signs: int = 0
    exponents: int = 0
    mantissas: int = 0
    numeric: bool = True
    largest: float = 0.0
    squares: float = 0.0
    before: float = 0.0
    after: float = 0.0
    broken: int = 0
    mended: int = 0

    def __add__(self, other: Moved) -> Moved:
        planes = _added(self.bytes_changed, other.bytes_changed)
        return Moved(
            count=self.count + other.count,
            changed=self.changed + other.changed,
            bytes_changed=planes,
            signs=self.signs + other.signs,
            exponents=self.exponents + other.exponents,
            mantissas=self.mantissas + other.mantissas,
            numeric=self.numeric and other.numeric,
            largest=max(self.largest, other.largest),
            squares=self.squares + other.squares,
            before=self.before + other.before,
            after=self.after + other.after,
            broken=self.broken + other.broken,
            mended=self.mended + other.mended,
        )

    @property
    def relative(self) -> float | None:
        """The norm of the difference for each of the norm before; None of what has no norm."""
        if not self.numeric or not self.before:
            return None if not self.numeric or self.squares else 0.0
        return math.sqrt(self.squares) / math.sqrt(self.before)

    @property
    def cosine(self) -> float | None:
        """Of the angle between the two, as vectors; None if one of them has no length.

        From the difference's length and theirs: exact where they are nearly parallel.
        """
        norms = math.sqrt(self.before) * math.sqrt(self.after)
        if not self.numeric or not 0 < norms < math.inf:
            return None
        apart = self.squares - (math.sqrt(self.after) - math.sqrt(self.before)) ** 2
        return max(-1.0, min(1.0, 1 - apart / (2 * norms)))


def compare_bytes(before: Bytes, after: Bytes, dtype: str) -> Moved:
    """Compare as many bytes of elements of one type (a name of `dtypes`), bit by bit.

    Both are uint8, contiguous, of the same size, whole elements.  Takes a few
    MiB, and holds the interpreter for moments only.
    """
    number = _number(dtype)
    if number is None:
        return _compare_opaque(before, after, to_numpy(dtype).itemsize)
    found = Moved(bytes_changed=(0,) * number.itemsize)
    size = _BLOCK * number.itemsize
    with np.errstate(all="ignore"):  # a signalling NaN is no error here
        for at in range(0, before.size, size):
            one, other = (array[at : at + size].view(number) for array in (before, after))
            found += _compare_block(one, other, dtype)
    return found


def compare_numbers(before: _Array, after: _Array) -> Moved:
    """Compare arrays of one shape and of different types, number by number; no bits.

    Raises:
        TypeError: one is of complex numbers and the other isn't, or they are no numbers.
    """
    found = Moved()
    with np.errstate(all="ignore"):
        for one, other in zip(_wide(before), _wide(after), strict=True):
            equal = (one == other) | (np.isnan(one) & np.isnan(other))
            changed = one.size - int(np.count_nonzero(equal))
            found += _differences(one, other, Moved(one.size, changed))
    return found


def are_numbers(dtype: str) -> bool:
    """Whether elements of a type can be subtracted from each other."""
    kind = to_numpy(dtype).kind
    return kind in "biufc" or (kind == "V" and hasattr(ml_dtypes, dtype.removeprefix(">")))


def _number(dtype: str) -> np.dtype[Any] | None:
    """The numbers that elements consist of; None if they are none, or too wide to be compared."""
    plain = to_numpy(dtype)
    if plain.kind == "c":
        plain = np.dtype(f"{plain.byteorder}f{plain.itemsize // 2}")
    return plain if are_numbers(dtype) and plain.itemsize in (1, 2, 4, 8) else None


def _compare_opaque(before: Bytes, after: Bytes, itemsize: int) -> Moved:
    other = before.reshape(-1, itemsize) != after.reshape(-1, itemsize)
    changed = int(np.count_nonzero(other.any(axis=1)))
    return Moved(len(other), changed, numeric=False)


def _compare_block(one: _Array, other: _Array, dtype: str) -> Moved:
    unsigned = np.dtype(f"u{one.dtype.itemsize}").newbyteorder(one.dtype.byteorder)
    bits = one.view(unsigned) ^ other.view(unsigned)
    bits = bits.astype(bits.dtype.newbyteorder("="), copy=False)
    planes = tuple(_count(bits, 0xFF << 8 * at) for at in range(bits.itemsize))
    sign, exponent, mantissa = (_count(bits, mask) for mask in _fields(dtype))
    bare = Moved(
        count=one.size,
        changed=int(np.count_nonzero(bits)),
        bytes_changed=planes,
        signs=sign,
        exponents=exponent,
        mantissas=mantissa,
    )
    return _differences(one.astype(np.float64), other.astype(np.float64), bare)


def _count(bits: _Array, mask: int) -> int:
    """Of how many some of these bits are set."""
    return int(np.count_nonzero(bits & bits.dtype.type(mask))) if mask else 0


def _squares(numbers: _Array) -> float:
    """Their sum, by this thread alone: BLAS would start others, which wait for each other."""
    return float(np.einsum("i,i->", numbers, numbers))


def _differences(one: _Array, other: _Array, bare: Moved) -> Moved:
    """What is known of bits, with how far the numbers are apart."""
    apart = other - one
    squares, broken, mended = _squares(apart), 0, 0
    if not math.isfinite(squares):
        finite = np.isfinite(one), np.isfinite(other)
        broken = int(np.count_nonzero(finite[0] & ~finite[1]))
        mended = int(np.count_nonzero(finite[1] & ~finite[0]))
        both = finite[0] & finite[1]
        one, other = one[both], other[both]
        apart = other - one
        squares = _squares(apart)
    largest = float(np.abs(apart).max()) if apart.size else 0.0
    return Moved(
        *(bare.count, bare.changed, bare.bytes_changed),
        *(bare.signs, bare.exponents, bare.mantissas),
        largest=largest,
        squares=squares,
        before=_squares(one),
        after=_squares(other),
        broken=broken,
        mended=mended,
    )


@cache
def _fields(dtype: str) -> tuple[int, int, int]:
    """The bits of sign, exponent and mantissa of a float type; of others none."""
    number = _number(dtype)
    assert number is not None
    if number.kind not in "fV" or "int" in dtype:
        return 0, 0, 0
    info: Any = ml_dtypes.finfo(number.newbyteorder("="))  # type: ignore[no-untyped-call]
    mantissa = (1 << int(info.nmant)) - 1
    sign = 0 if "e8m0" in dtype else 1 << (int(info.bits) - 1)
    every = (1 << int(info.bits)) - 1
    return sign, every & ~sign & ~mantissa, mantissa


def _wide(array: _Array) -> Iterator[_Array]:
    """An array's numbers as float64, a block at a time."""
    flat = array.reshape(-1)
    if flat.dtype.kind == "c":
        flat = flat.view(np.dtype(f"{flat.dtype.byteorder}f{flat.dtype.itemsize // 2}"))
    for at in range(0, flat.size, _BLOCK):
        yield flat[at : at + _BLOCK].astype(np.float64)


def _added(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    if not one or not other:
        return one or other
    return tuple(a + b for a, b in zip(one, other, strict=True))
