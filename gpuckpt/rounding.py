"""float32 rounded to two-byte floats: what mixed-precision training makes of its masters.

To the nearest, a tie to the even one, by integer arithmetic alone, so that no
mode of a floating-point unit matters.  A NaN keeps its sign: as bfloat16 it is
0x7fc0, as float16 a quiet one with the upper bits of its payload.

By the compiled loops where they are, else by numpy.  numpy's version is the
reference: whatever else does it gives the same bytes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gpuckpt.native import HALF, WIDE, native_for

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]

MASTER = "float32"
# What it can be rounded to, as the loops call it.
NARROW = {"float16": HALF, "bfloat16": WIDE}
# Bytes done at a time: they stay in a core's cache.
_BLOCK = 1 << 16


def round_to(dtype: str, raw: Bytes, out: Bytes) -> None:
    """Write float32 elements, rounded, as `dtype`, one of `NARROW`: uint8[4·n] to uint8[2·n].

    Both contiguous, at any address; they don't overlap.
    """
    assert raw.size == 2 * out.size, (raw.size, out.size)
    if loops := native_for(2, out, raw):
        loops.round(raw, NARROW[dtype], out)
    else:
        round_by_numpy(dtype, raw, out)


def round_by_numpy(dtype: str, raw: Bytes, out: Bytes) -> None:
    """What `round_to` does."""
    rounded = _to_bfloat16 if dtype == "bfloat16" else _to_float16
    for at in range(0, raw.size, _BLOCK):
        bits = raw[at : at + _BLOCK].view("<u4")
        out[at // 2 : (at + _BLOCK) // 2].view("<u2")[:] = rounded(bits)


def _to_bfloat16(bits: Words) -> Words:
    even = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    nan = ((bits >> 16) & 0x8000) | 0x7FC0
    words: Words = np.where((bits & 0x7FFFFFFF) > 0x7F800000, nan, even)
    return words


def _to_float16(bits: Words) -> Words:
    x = bits & 0x7FFFFFFF
    even = np.minimum((x - 0x38000000 + 0xFFF + ((x >> 13) & 1)) >> 13, 0x7C00)
    even = np.where(x > 0x7F800000, 0x7E00 | (x >> 13 & 0x3FF), even)
    shift = np.clip(126 - (x >> 23).astype(np.int32), 1, 31).astype(np.uint32)
    whole = (x & 0x7FFFFF) | 0x800000
    small = (whole + (np.uint32(1) << (shift - 1)) - 1 + (whole >> shift & 1)) >> shift
    words: Words = np.where(x < 0x38800000, small, even) | ((bits >> 16) & 0x8000)
    return words
