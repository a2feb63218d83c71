"""How a chunk is cut into tiles: boxes of it whose bytes lie together on the disk.

Who wants some columns of a chunk then reads some of its bytes.  A tile's bytes
are those of its elements in C order; tiles follow each other by their numbers,
of which that along the first axis is the fastest, so that what some columns
are of all rows is one run.

By the compiled loops where they are, else by numpy.  numpy's version is the
reference: whatever else does it gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache, reduce

import numpy as np
import numpy.typing as npt

from gpuckpt.boxes import Box, Shape
from gpuckpt.fingerprint import leaf_digests
from gpuckpt.layout import LEAF_NBYTES
from gpuckpt.native import native_for
from gpuckpt.runs import boxes_of
from gpuckpt.spec import Ends

Bytes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.uint32]
Checks = npt.NDArray[np.uint64]

TILE_NBYTES_MAX = LEAF_NBYTES
# What the compiled loops take.
FOLDED_AXES = 3
_CHECK_NBYTES = 8


class Grid:
    """The tiles of a chunk, by their numbers."""

    def __init__(self, ends: Ends) -> None:
        """`ends` ascend along each axis, from 1 on."""
        self.ends = ends
        self.shape = tuple(each[-1] for each in ends)
        self.counts = tuple(len(each) for each in ends)

    @property
    def count(self) -> int:
        """How many tiles there are."""
        return math.prod(self.counts)

    @cached_property
    def sizes(self) -> Counts:
        """Elements of each tile."""
        spans = [np.diff(each, prepend=0) for each in self.ends]
        whole = reduce(np.multiply.outer, spans, np.ones((), np.int64))
        return whole.ravel(order="F").astype(np.uint32)

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """How many elements come before each tile, and all of them."""
        return np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])

    def elements(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many elements each of some tiles has."""
        found, step = np.ones(numbers.size, np.int64), 1
        for ends in self.ends:
            found *= np.diff(ends, prepend=0)[numbers // step % len(ends)]
            step *= len(ends)
        return found

    def box(self, number: int) -> Box:
        """What a tile has of the chunk."""
        spans = []
        for ends in self.ends:
            number, at = divmod(number, len(ends))
            first = ends[at - 1] if at else 0
            spans.append((first, ends[at] - first))
        return Box(tuple(first for first, _ in spans), tuple(size for _, size in spans))

    def among(self, box: Box) -> npt.NDArray[np.int64]:
        """The numbers of the tiles that have elements of a box of the chunk, in order."""
        found, step = np.zeros(1, np.int64), 1
        for ends, first, last in zip(self.ends, box.offset, box.end, strict=True):
            at = np.searchsorted(ends, first, "right"), np.searchsorted(ends, last - 1, "right")
            along = np.arange(at[0], at[1] + 1) * step
            found = np.add.outer(along, found).ravel()
            step *= len(ends)
        return found

    @cached_property
    def folded(self) -> tuple[Counts, ...] | None:
        """The same tiles of a chunk of three axes; None if they are none of such a one."""
        axes: list[Counts] = []
        for each in self.ends:
            if axes and len(each) == 1:
                axes[-1] = axes[-1] * np.uint32(each[0])
            elif each != (1,):
                axes.append(np.array(each, np.uint32))
        if len(axes) > FOLDED_AXES:
            return None
        return (*[np.ones(1, np.uint32)] * (FOLDED_AXES - len(axes)), *axes)


@lru_cache(maxsize=32)
def grid_of(ends: Ends) -> Grid:
    """The tiles that end so."""
    return Grid(ends)


def to_tiles(given: Bytes, grid: Grid, item: int, out: Bytes) -> None:
    """Put a chunk's elements of `item` bytes, in C order, into that of the tiles."""
    loops = native_for(1, given, out)
    if loops is not None and grid.folded is not None:
        loops.tile(given, out, item, grid.folded)
        return
    whole = given.reshape(*grid.shape, item)
    for box, part in _tiles(grid, item, out):
        part[...] = whole[box.slices]


def from_tiles(given: Bytes, grid: Grid, item: int, out: Bytes) -> None:
    """Put them back into C order: undoes `to_tiles`."""
    loops = native_for(1, given, out)
    if loops is not None and grid.folded is not None:
        loops.tile(given, out, item, grid.folded, back=True)
        return
    whole = out.reshape(*grid.shape, item)
    for box, part in _tiles(grid, item, given):
        whole[box.slices] = part


def check_tiles(plane: Bytes, sizes: Counts) -> Checks:
    """64 bits of each tile's digest: those of XXH3-128, filled up as a leaf is."""
    loops = native_for(1, plane)
    if loops is not None:
        return loops.check_tiles(plane, sizes)
    ends = np.cumsum(sizes, dtype=np.int64).tolist()
    parts = (plane[end - size : end] for end, size in zip(ends, sizes.tolist(), strict=True))
    digests = b"".join(leaf_digests(part.data)[:_CHECK_NBYTES] for part in parts)
    return np.frombuffer(digests, "<u8")


def chunk_count(shape: Shape, most: int) -> int:
    """How many elements the chunks of a tensor have, `most` at most, each of which is a box.

    All but the last are of one size.
    """
    row = math.prod(shape)
    for axis, extent in enumerate(shape):
        row //= extent
        if row <= most:
            rows = min(most // row, extent)
            alone = math.prod(shape[:axis]) == 1
            return row * (rows if alone else _divisor(extent, rows))
    return 1


def box_of(shape: Shape, first: int, last: int) -> Box | None:
    """The box that elements `first` … `last` - 1 are, in C order; None if they are none."""
    found = list(boxes_of(shape, first, last))
    return found[0] if len(found) == 1 else None


def within(box: Box, borders: Sequence[Sequence[int]], item: int) -> Ends:
    """Where tiles of a box end between borders along each axis, counted from its first element.

    Where a tile had more bytes than one may have, there are more of them.
    """
    ends = [
        [at - first for at in axis if first < at < last] + [last - first]
        for axis, first, last in zip(borders, box.offset, box.end, strict=True)
    ]
    for axis, each in enumerate(ends):
        widest = [max(np.diff(one, prepend=0)) for one in ends]
        too_many = -(-math.prod(map(int, widest)) * item // TILE_NBYTES_MAX)
        if too_many > 1:
            ends[axis] = list(_finer(each, max(int(widest[axis]) // too_many, 1)))
    return tuple(tuple(each) for each in ends)


def _finer(ends: Sequence[int], longest: int) -> Iterator[int]:
    first = 0
    for end in ends:
        yield from range(first + longest, end, longest)
        yield end
        first = end


def _divisor(extent: int, most: int) -> int:
    """The largest one of `extent` that isn't more than `most`."""
    small = [n for n in range(1, math.isqrt(extent) + 1) if extent % n == 0]
    return max(n for one in small for n in (one, extent // one) if n <= most)


def _tiles(grid: Grid, item: int, tiled: Bytes) -> Iterator[tuple[Box, Bytes]]:
    """Each tile, and its elements in the tiles' order."""
    for number in range(grid.count):
        box, first = grid.box(number), int(grid.starts[number]) * item
        part = tiled[first : first + box.count * item]
        yield box, part.reshape(*box.shape, item)
