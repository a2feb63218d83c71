"""Boxes: the parts of a tensor that shards are, and how they lie to each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Shape = tuple[int, ...]
_Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Box:
    """Those elements of a tensor whose index along each axis is in [offset, offset + shape)."""

    offset: Shape
    shape: Shape

    def __post_init__(self) -> None:
        if len(self.offset) != len(self.shape) or min((*self.offset, *self.shape), default=0) < 0:
            raise ValueError(f"no box: offset {self.offset}, shape {self.shape}")

    @property
    def end(self) -> Shape:
        """Along each axis, the index after its last."""
        return tuple(at + n for at, n in zip(self.offset, self.shape, strict=True))

    @property
    def count(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """What takes it out of the whole tensor's array."""
        return tuple(slice(at, to) for at, to in zip(self.offset, self.end, strict=True))

    def __and__(self, other: Box) -> Box | None:
        """What both have; None if that is nothing."""
        first = tuple(map(max, self.offset, other.offset))
        last = tuple(map(min, self.end, other.end))
        shape = tuple(to - at for at, to in zip(first, last, strict=True))
        return Box(first, shape) if min(shape, default=1) > 0 else None

    def inside(self, other: Box) -> Box:
        """The same elements, counted from the first of `other`, which has them all."""
        offset = tuple(at - by for at, by in zip(self.offset, other.offset, strict=True))
        return Box(offset, self.shape)

    def fits(self, whole: Shape) -> bool:
        """Whether a tensor of this shape has all its elements."""
        return len(whole) == len(self.shape) and all(map(int.__le__, self.end, whole))

    def __str__(self) -> str:
        return f"[{', '.join(f'{a}:{b}' for a, b in zip(self.offset, self.end, strict=True))}]"


@lru_cache(maxsize=1024)  # thousands of tensors have few shapes
def whole_box(shape: Shape) -> Box:
    """All of a tensor."""
    return Box((0,) * len(shape), shape)


def gap(boxes: Iterable[Box], wanted: Box) -> Box | None:
    """A part of `wanted` that none of `boxes` has; None if they have it all.

    They may overlap.  Takes time and memory in proportion to the cells that
    all boxes' edges cut `wanted` into: for a grid of boxes, their number.
    """
    boxes = boxes if isinstance(boxes, Sequence) else list(boxes)
    if not wanted.count or (boxes and boxes[0] == wanted):  # a whole tensor: arrays take longer
        return None
    low, high = _clipped(boxes, wanted)
    if bool((high - low == wanted.shape).all(axis=1).any()):
        return None
    ends = [np.array([0, extent]) for extent in wanted.shape]
    cuts = [np.unique(np.concatenate([*e])) for e in zip(ends, low.T, high.T, strict=True)]
    held = np.zeros([len(edges) - 1 for edges in cuts], bool)
    first, last = _cells(low, cuts), _cells(high, cuts)
    single = (last - first == 1).all(axis=1)
    if single.any():  # of a grid, these are all
        held[tuple(first[single].T)] = True
    for frm, to in zip(first[~single].tolist(), last[~single].tolist(), strict=True):
        held[tuple(map(slice, frm, to))] = True
    if held.all():
        return None
    at = np.unravel_index(int(np.argmin(held)), held.shape)
    offset = [int(edges[i]) for edges, i in zip(cuts, at, strict=True)]
    end = [int(edges[i + 1]) for edges, i in zip(cuts, at, strict=True)]
    shape = tuple(to - frm for frm, to in zip(offset, end, strict=True))
    return Box(tuple(a + b for a, b in zip(offset, wanted.offset, strict=True)), shape)


def cover(boxes: Sequence[Box], wanted: Box) -> list[tuple[int, Box]]:
    """Which part of `wanted` to take from which of `boxes`, by position: no element twice.

    What none of them has is in no part.  Boxes that don't overlap take time in
    proportion to their number, others to its square at worst.
    """
    if len(boxes) == 1 and boxes[0] == wanted and wanted.count:
        return [(0, wanted)]
    found = [(at, common) for at, box in enumerate(boxes) if (common := box & wanted) is not None]
    if sum(common.count for _, common in found) <= wanted.count and gap(boxes, wanted) is None:
        return found
    found.sort(key=lambda part: -part[1].count)
    parts: list[tuple[int, Box]] = []
    left = [wanted] if wanted.count else []
    for at, box in found:
        if not left:
            break
        parts += [(at, common) for one in left if (common := one & box) is not None]
        left = [rest for one in left for rest in _without(one, box)]
    return sorted(parts, key=lambda part: part[0])


def _without(one: Box, other: Box) -> list[Box]:
    """Boxes of what `one` has and `other` doesn't: two for each axis at most."""
    common = one & other
    if common is None:
        return [one]
    found = []
    first, end = list(one.offset), list(one.end)
    for axis, (start, stop) in enumerate(zip(common.offset, common.end, strict=True)):
        for low, high in ((first[axis], start), (stop, end[axis])):
            if low < high:
                offset, ends = [*first], [*end]
                offset[axis], ends[axis] = low, high
                shape = tuple(b - a for a, b in zip(offset, ends, strict=True))
                found.append(Box(tuple(offset), shape))
        first[axis], end[axis] = start, stop
    return found


def _clipped(boxes: Iterable[Box], wanted: Box) -> tuple[_Indices, _Indices]:
    """Where what `wanted` has of each box begins and ends, from its own beginning."""
    every = list(boxes)
    rows = len(every), len(wanted.shape)
    low = np.array([box.offset for box in every], np.int64).reshape(rows)
    high = low + np.array([box.shape for box in every], np.int64).reshape(rows)
    low, high = np.maximum(low, wanted.offset), np.minimum(high, wanted.end)
    inner = (low < high).all(axis=1)
    begin = np.array(wanted.offset, np.int64)
    return low[inner] - begin, high[inner] - begin


def _cells(at: _Indices, cuts: Sequence[_Indices]) -> _Indices:
    columns = [np.searchsorted(edges, column) for edges, column in zip(cuts, at.T, strict=True)]
    return np.array(columns, np.int64).reshape(len(cuts), len(at)).T
