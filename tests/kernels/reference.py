"""What the kernels must give, by numpy and xxhash, for all that the package has no reference of."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xxhash

digest = xxhash.xxh3_128_digest
FLOATS = {1: np.dtype(np.float16), 3: np.dtype(np.float32), 4: np.dtype(np.float64)}


def folded(raw: Any, base: Any, width: int) -> Any:
    """Differences of elements from the base's: small ones of either sign are small numbers."""
    unsigned, signed = np.dtype(f"<u{width}"), np.dtype(f"<i{width}")
    difference = raw.copy().view(unsigned) - base.copy().view(unsigned)
    sign = (difference.view(signed) >> (8 * width - 1)).view(unsigned)
    return (((difference << 1) & unsigned.type(2 ** (8 * width) - 1)) ^ sign).view(np.uint8)


def rotated(raw: Any, width: int) -> Any:
    """Elements turned left by one bit, as bits of a number of any length."""
    bits = np.unpackbits(raw.reshape(-1, width)[:, ::-1], axis=1)
    return np.packbits(np.roll(bits, -1, axis=1), axis=1)[:, ::-1].reshape(-1).copy()


def elements_of(raw: Any, kind: int, values: Any) -> Any:
    """The elements of a chunk as float64."""
    if kind == 2:
        raw = (raw.copy().view(np.uint16).astype(np.uint32) << 16).view(np.uint8)
    with np.errstate(invalid="ignore"):  # a signalling NaN is one, too
        if kind == 5:
            return values[raw].astype(np.float64)
        return raw.copy().view(FLOATS[3 if kind == 2 else kind]).astype(np.float64)


def statistics_of(raw: Any, kind: int, values: Any) -> tuple[int, int, float]:
    """NaNs, infinities, and the sum of squares of all else, as nearly as float64 has it."""
    if not kind:
        return 0, 0, 0.0
    elements = elements_of(raw, kind, values)
    finite = elements[np.isfinite(elements)]
    with np.errstate(over="ignore", under="ignore"):
        squares = np.square(finite)
    whole = math.fsum(squares) if np.isfinite(squares).all() else math.inf
    return int(np.isnan(elements).sum()), int(np.isinf(elements).sum()), whole
