"""Sizes and durations as people write them."""

from __future__ import annotations

import math
import re
from datetime import timedelta

from gpuckpt.errors import InvalidError

_NBYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_NBYTES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SECONDS = {"": 1.0, "S": 1.0, "MIN": 60.0, "M": 60.0, "H": 3600.0, "D": 86400.0}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_nbytes(size: int | str) -> int:
    """`"1 GiB"`, `"500 MB"` or a number of bytes, as bytes."""
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    number, factor = _parse(size, _NBYTES, "a size is bytes or a text like '1 GiB'")
    return int(number * factor)


def parse_seconds(duration: float | str | timedelta) -> float:
    """`"2 h"`, `"30 s"`, a timedelta or a number of seconds, as seconds."""
    if isinstance(duration, timedelta):
        duration = duration.total_seconds()
    number, factor = _parse(duration, _SECONDS, "a duration is seconds or a text like '2 h'")
    return number * factor


def format_nbytes(nbytes: float) -> str:
    """Bytes with the unit that leaves three or four digits: `14.0 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def _parse(
    value: float | str, units: dict[str, float] | dict[str, int], hint: str
) -> tuple[float, float]:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value), 1.0
    match = _NUMBER.fullmatch(str(value))
    if isinstance(value, bool) or not match or match[2].upper() not in units:
        raise InvalidError(f"{hint}; got {value!r}")
    return float(match[1]), units[match[2].upper()]
