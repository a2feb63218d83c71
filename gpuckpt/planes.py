"""Split a chunk into planes, one for byte k of every element, and join them again.

By the compiled loops where they are, else by numpy.  numpy's version is the
reference: whatever else splits gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from gpuckpt.native import native_for

Bytes = npt.NDArray[np.uint8]


def split(raw: Bytes, width: int, out: Bytes) -> list[Bytes]:
    """Byte k of every element together.  uint8[n·width] → `width` of uint8[n], in `out`."""
    room = out[: raw.size]
    loops = native_for(width, raw, room)
    if loops is None:
        return split_by_numpy(raw, width, room)
    loops.split(raw, width, room)
    return list(room.reshape(width, -1))


def join(planes: Sequence[Bytes], out: Bytes) -> None:
    """Put elements together again: undoes `split`.  `width` of uint8[n] → uint8[n·width]."""
    loops = native_for(len(planes), out, *planes)
    if loops is None:
        join_by_numpy(planes, out)
    else:
        loops.join(planes, out)


def join_in_parts(planes: Sequence[Bytes], out: Bytes, count: int) -> Iterator[Bytes]:
    """What `join` does, `count` elements at a time; yields each part of `out` once it is filled."""
    width = len(planes)
    loops = native_for(width, out, *planes)
    if loops is not None:
        yield from loops.join_in_parts(planes, out, count)
        return
    for at in range(0, out.size // width, count):
        part = out[at * width : (at + count) * width]
        join_by_numpy([plane[at : at + count] for plane in planes], part)
        yield part


def split_by_numpy(raw: Bytes, width: int, out: Bytes) -> list[Bytes]:
    """What `split` gives; `out` has `raw`'s size."""
    count = raw.size // width
    elements = raw.reshape(count, width)
    planes = out.reshape(width, count)
    for k in range(width):
        planes[k] = elements[:, k]
    return list(planes)


def join_by_numpy(planes: Sequence[Bytes], out: Bytes) -> None:
    """What `join` does."""
    elements = out.reshape(-1, len(planes))
    for k, plane in enumerate(planes):
        elements[:, k] = plane
