"""Look at a chunk in host memory once: its fingerprint, its statistics, and its planes.

By the compiled loops, which do it leaf by leaf while a leaf is in the core's own cache, where
they are; else one after the other, as the modules do that are imported here.  Both give the
same fingerprints and planes, and the same counts; sums of squares are within 1e-6 of the exact
ones either way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gpuckpt.dtypes import is_turned
from gpuckpt.fingerprint import fingerprint, root
from gpuckpt.native import NONE, WIDTHS, native
from gpuckpt.planes import split
from gpuckpt.record import record
from gpuckpt.statistics import (
    Statistics,
    squares_in_loops,
    statistics_of,
    statistics_with,
)

Bytes = npt.NDArray[np.uint8]


@record(frozen=True, slots=True)
class Look:
    """What was seen of a chunk; `planes` lie in the memory that was given for them.

    `checksum` is that of the chunk as it is, where it cost nothing to take.
    """

    fingerprint: str
    statistics: Statistics | None
    planes: Sequence[Bytes] | None = None
    checksum: str | None = None


def look(raw: Bytes, dtype: str, width: int = 1, room: Bytes | None = None) -> Look:
    """Look at elements of `dtype`, a name of `dtypes`, that have `width` bytes.

    `raw` is uint8, contiguous, at any address.  Unless `room` is None, which
    is as long at least, the planes go there, turned where the type is.
    """
    loops, turned = native(), is_turned(dtype)
    if loops is None or width not in WIDTHS:
        planes = None if room is None else split(raw, width, room, turned=turned)
        return Look(fingerprint(raw.data), statistics_of(raw, dtype), planes)
    squares, scale = squares_in_loops(raw, dtype)
    out = None if room is None else room[: raw.size]
    digests, total, check = loops.look(raw, squares, out, width, turned=turned)
    if squares[0] == NONE:
        statistics = statistics_of(raw, dtype)
    else:
        statistics = statistics_with(raw, dtype, total * scale)
    planes = None if out is None else list(out.reshape(width, -1))
    checksum = f"{check:016x}" if check else None
    return Look(root(digests, raw.size), statistics, planes, checksum)
