"""Names of element types, as they stand in manifests.

A name is numpy's or ml_dtypes' own (`float32`, `bfloat16`, `datetime64[ns]`),
`S5`/`U5` for fixed-width strings and `V16` for opaque bytes.  A leading `>`
marks big-endian elements; nothing else is byte-swapped.
"""

from __future__ import annotations

import re
from functools import lru_cache

import ml_dtypes
import numpy as np

from gpuckpt.errors import FormatError

# Kinds that numpy describes fully by name: bool, integers, floats, complex numbers.
_PLAIN = {
    name: np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
        # x86's 80-bit floats; on other machines these names are of other numbers
        *(("float128", "complex256") if np.finfo(np.longdouble).nmant == 63 else ()),
    )
}
_SMALL = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in (
        *("bfloat16", "int2", "int4", "uint2", "uint4", "float4_e2m1fn"),
        *("float6_e2m3fn", "float6_e3m2fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
    if hasattr(ml_dtypes, name)
}
# Floats of which sign and exponent make nine bits: turned by one, the exponent is a byte by itself.
# Of float16 and float64 a turn gained nothing, or lost (ADR 0024).
_TURNED = ("float32", "bfloat16", "complex64")
_BY_NAME = _PLAIN | _SMALL
_BY_DTYPE = {dtype: name for name, dtype in _BY_NAME.items()}
_TIME = re.compile(r"(datetime64|timedelta64)(\[[0-9]{0,9}(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?")
# numpy makes new arrays of these little-endian whatever it is asked for.
_UNITLESS = ("datetime64", "timedelta64")
# An element is never cut, so that it has to fit into any chunk.
ITEM_NBYTES_MAX = 64 << 10
_FIXED = re.compile(r"[SUV][1-9][0-9]{0,8}")


def name_of(dtype: np.dtype[np.generic]) -> str | None:
    """The name of `dtype`, or None if its elements can't be saved as bytes."""
    known = _BY_DTYPE.get(dtype.newbyteorder("=") if dtype.byteorder in "<>" else dtype)
    if known is not None:
        name = known
    elif dtype.kind in "Mm":
        name = dtype.name
    elif dtype.kind in "SUV" and dtype.type in (np.bytes_, np.str_, np.void):
        if dtype.fields or dtype.subdtype or not 0 < dtype.itemsize <= ITEM_NBYTES_MAX:
            return None
        name = dtype.str[1:]
    else:
        return None
    swapped = dtype.itemsize > 1 and dtype.byteorder == ">"
    if swapped and name in _UNITLESS:
        return None
    return f">{name}" if swapped else name


@lru_cache(1024)  # files name the types, and a stranger's any number of them
def to_numpy(name: str) -> np.dtype[np.generic]:
    """The numpy dtype that `name` stands for: the inverse of `name_of`.

    Raises:
        FormatError: no such element type is known here.
    """
    plain = name.removeprefix(">")
    if plain in _UNITLESS and plain != name:
        raise FormatError(f"elements of type {name!r} can't be held by numpy")
    if plain in _BY_NAME:
        dtype: np.dtype[np.generic] = _BY_NAME[plain]
    elif _TIME.fullmatch(plain) or _FIXED.fullmatch(plain):
        dtype = np.dtype(plain)
        if dtype.itemsize > ITEM_NBYTES_MAX:
            raise FormatError(f"elements of type {name!r} are larger than {ITEM_NBYTES_MAX} bytes")
    else:
        raise FormatError(f"element type {name!r} is not known to this gpuckpt; upgrade it")
    return dtype.newbyteorder(">") if plain != name else dtype


def is_turned(name: str) -> bool:
    """Whether elements of this type are turned before they are split into planes."""
    return name in _TURNED


def width_of(name: str) -> int:
    """How many planes elements of this type are split into: 1, 2, 4 or 8.

    Complex numbers count as their two parts, strings as their characters;
    what has no such width (`V16`, 80-bit floats) is one plane.
    """
    dtype = to_numpy(name)
    nbytes = {"c": dtype.itemsize // 2, "U": 4, "S": 1, "V": 1}.get(dtype.kind, dtype.itemsize)
    if name.removeprefix(">") in _SMALL:
        nbytes = dtype.itemsize
    return nbytes if nbytes in (1, 2, 4, 8) else 1
