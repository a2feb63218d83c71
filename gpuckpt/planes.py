"""Split a chunk into planes, one for byte k of every element, and join them again.

Of floats, the elements are turned first: left by one bit, the highest one
becoming the lowest, so that the whole exponent lies in the last plane and the
sign, which nothing foretells, leaves it (docs/adr/0024-turned-planes.md).

By the compiled loops where they are, else by numpy.  numpy's version is the
reference: whatever else splits gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuckpt.native import native_for

Bytes = npt.NDArray[np.uint8]
Elements = npt.NDArray[np.unsignedinteger[Any]]

# Bytes that numpy does at a time: they stay in a core's cache.
_BLOCK = 1 << 16


def split(raw: Bytes, width: int, out: Bytes, *, turned: bool = False) -> list[Bytes]:
    """Byte k of every element together.  uint8[n·width] → `width` of uint8[n], in `out`.

    `turned`, for a width of 2, 4 or 8, gives the bytes of elements that are turned.
    """
    room = out[: raw.size]
    loops = native_for(width, raw, room)
    if loops is None:
        return split_by_numpy(raw, width, room, turned=turned)
    loops.split(raw, width, room, turned=turned)
    return list(room.reshape(width, -1))


def join(planes: Sequence[Bytes], out: Bytes, *, turned: bool = False) -> None:
    """Put elements together again: undoes `split`.  `width` of uint8[n] → uint8[n·width]."""
    loops = native_for(len(planes), out, *planes)
    if loops is None:
        join_by_numpy(planes, out, turned=turned)
    else:
        loops.join(planes, out, turned=turned)


def join_in_parts(
    planes: Sequence[Bytes], out: Bytes, count: int, *, turned: bool = False
) -> Iterator[Bytes]:
    """What `join` does, `count` elements at a time; yields each part of `out` once it is filled."""
    width = len(planes)
    loops = native_for(width, out, *planes)
    if loops is not None:
        yield from loops.join_in_parts(planes, out, count, turned=turned)
        return
    for at in range(0, out.size // width, count):
        part = out[at * width : (at + count) * width]
        join_by_numpy([plane[at : at + count] for plane in planes], part, turned=turned)
        yield part


def turn(elements: Elements) -> Elements:
    """Each element's highest bit behind its lowest one, in a new array."""
    one, top = map(elements.dtype.type, (1, 8 * elements.itemsize - 1))
    return (elements << one) | (elements >> top)


def turn_back(elements: Elements) -> Elements:
    """Undo `turn`."""
    one, top = map(elements.dtype.type, (1, 8 * elements.itemsize - 1))
    return (elements >> one) | (elements << top)


def split_by_numpy(raw: Bytes, width: int, out: Bytes, *, turned: bool = False) -> list[Bytes]:
    """What `split` gives; `out` has `raw`'s size."""
    planes = out.reshape(width, -1)
    for begin in range(0, raw.size, _BLOCK):
        some = raw[begin : begin + _BLOCK]
        if turned:
            some = turn(np.ascontiguousarray(some).view(f"<u{width}")).view(np.uint8)
        at = begin // width
        for k in range(width):
            planes[k, at : at + some.size // width] = some[k::width]
    return list(planes)


def join_by_numpy(planes: Sequence[Bytes], out: Bytes, *, turned: bool = False) -> None:
    """What `join` does."""
    width = len(planes)
    for begin in range(0, out.size, _BLOCK):
        room = out[begin : begin + _BLOCK]
        some = np.empty_like(room) if turned else room
        at = begin // width
        for k, plane in enumerate(planes):
            some[k::width] = plane[at : at + some.size // width]
        if turned:
            room[...] = turn_back(some.view(f"<u{width}")).view(np.uint8)
