"""Pure arithmetic: how shards are cut so that other ranks read little more than they need.

What is read is a chunk at least.  A rank of another world wants a part of a
shard that ends within a chunk, so chunks are small against the tensor.  Along
any axis but the first, a chunk has a part of each row; so there a shard is
saved as several boxes, which end where an even division of the whole tensor
among some number of ranks ends (ADR 0041).  Or chunks are saved in tiles that
end so, along all axes (ADR 0056).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from typing import Literal, cast

from gpuckpt.boxes import Box, Shape
from gpuckpt.dtypes import to_numpy
from gpuckpt.errors import InvalidError
from gpuckpt.spec import Chunk, Ends, Plane, Spec
from gpuckpt.tileindex import BLOCKS, index_nbytes, index_nbytes_max
from gpuckpt.tiling import FOLDED_AXES, box_of, chunk_count, within

# Numbers of ranks among which a tensor may be divided later: the first that leaves boxes large
# enough is taken.
WAYS: tuple[tuple[int, ...], ...] = (
    tuple(range(2, 17)),
    (2, 3, 4, 6, 8, 12, 16),
    (2, 4, 8, 16),
    (2, 4, 8),
    (2, 4),
    (2,),
)
# The same for tiles, which cost less.
TILE_WAYS: tuple[tuple[int, ...], ...] = (
    tuple(range(2, 17)),
    (*range(2, 11), 12, 14, 16),
    (2, 3, 4, 5, 6, 8, 10, 12, 16),
    (2, 3, 4, 6, 8, 12, 16),
    (2, 4, 8, 16),
    (2, 4, 8),
    (2, 4),
    (2,),
)
TILE_NBYTES_LEAST = 3 << 10  # on average
# Of a tile's elements that follow each other in the chunk, on average: fewer are slow to gather.
RUN_NBYTES_LEAST = 32
# A shorter axis is one tile, but the first: a filter's width and height.
EXTENT_LEAST = 16
# A smaller chunk is read as a whole.
TILED_NBYTES_LEAST = 16 << 10
# Other ranks will want: parts along the axes that shards are parts along already, or any, or
# only whole shards.
RESHARD = ("any", "same", "none")
# Any, but where chunks in tiles would be read whole anyhow.
AUTO = "auto"
# A smaller box or chunk costs more time than it saves bytes.
BOX_NBYTES_LEAST = 32 << 10
CHUNK_NBYTES_LEAST = 64 << 10
# Of a whole tensor, so that sixteen ranks' fifteen borders cost a tenth of it at most.
CHUNKS = 160
_MASTER_ITEM = 4


Reshard = Literal["any", "same", "none"]


def check_reshard(given: object, *, parts: bool = True) -> Reshard:
    """How shards are cut, by the option `reshard`; `parts`: whether tiles will be read alone.

    Raises:
        InvalidError: it isn't one.
    """
    if given == AUTO:
        return "any" if parts else "same"
    if given not in RESHARD:
        raise InvalidError(f"reshard is one of {', '.join((AUTO, *RESHARD))}; got {given!r}")
    return cast(Reshard, given)


def rows_for(spec: Spec, reshard: Reshard) -> list[Spec]:
    """The rows as which a shard is saved, by the option `reshard`."""
    if reshard == "any":
        return [replace(spec, tiled=True)]
    boxes = cut(spec) if reshard == "same" else [spec.box]
    return [row_of(spec, box) for box in boxes]


def row_of(spec: Spec, box: Box) -> Spec:
    """The row of a part of what a spec has."""
    if box == spec.box:
        return spec
    return replace(spec, shape=box.shape, axes=None, offset=box.offset, whole=spec.full_shape)


def tiles_of(spec: Spec, chunk: Chunk) -> Ends:
    """Where the tiles of one of a shard's chunks end; nothing if it isn't to be tiled."""
    if not spec.tiled or spec.offset is None or chunk.nbytes < TILED_NBYTES_LEAST:
        return ()
    item = to_numpy(spec.dtype).itemsize
    box = box_of(spec.shape, chunk.start // item, (chunk.start + chunk.nbytes) // item)
    if box is None:
        return ()
    borders, begin = _borders(spec.full_shape, item), spec.box.offset
    inside = Box(tuple(a + b for a, b in zip(box.offset, begin, strict=True)), box.shape)
    ends = within(inside, borders, item)
    # Of planes that are in blocks, all of them.
    index = index_nbytes([Plane(BLOCKS, 0)] * spec.width, ends)
    return ends if max(map(len, ends)) > 1 and index <= index_nbytes_max(chunk.nbytes) else ()


@lru_cache(maxsize=1024)
def _borders(shape: Shape, item: int) -> tuple[tuple[int, ...], ...]:
    """Where tiles of a tensor end along each axis."""
    axes = _tiled_axes(shape)
    for ways in TILE_WAYS if axes else ():
        found = tuple(tuple(ends(n, ways)) if at in axes else () for at, n in enumerate(shape))
        most = len({Fraction(at, count) for count in ways for at in range(1, count)})
        # Borders next to each other, since ranks' parts are rounded up, count as one.
        counts = [min(len(each), most) + 1 for each in found]
        run = math.prod(shape[axes[-1] :]) * item
        if run < counts[axes[-1]] * RUN_NBYTES_LEAST and axes[-1]:
            continue
        if math.prod(shape) * item >= math.prod(counts) * TILE_NBYTES_LEAST:
            return found
    return tuple(() for _ in shape)


def _tiled_axes(shape: Shape) -> list[int]:
    """The axes along which tiles may end: of a chunk, these are tiles of three axes."""
    axes = [axis for axis, extent in enumerate(shape) if not axis or extent >= EXTENT_LEAST]
    while len(axes) > 1 and len(axes) + (math.prod(shape[: axes[0]]) > 1) > FOLDED_AXES:
        axes.remove(min(axes, key=lambda axis: (shape[axis], -axis)))
    return axes


def cut(spec: Spec) -> list[Box]:
    """The boxes as which a shard is saved: all of it, in order; itself, if it isn't cut.

    It is cut along the axes along which it is a part of its tensor, but the first.
    """
    axes = {axis for axis in sharded_axes(spec) - {0} if spec.full_shape[axis] > 1}
    if not spec.nbytes or not axes:
        return [spec.box]
    for ways in WAYS:
        borders = {axis: set(ends(spec.full_shape[axis], ways)) for axis in axes}
        count = math.prod(len(found) + 1 for found in borders.values())
        if whole_nbytes(spec) >= count * BOX_NBYTES_LEAST:
            return _between(spec.box, borders)
    return [spec.box]


def sharded_axes(spec: Spec) -> set[int]:
    """The axes along which a shard doesn't have all of its tensor."""
    pairs = enumerate(zip(spec.shape, spec.full_shape, strict=True))
    return {axis for axis, (own, whole) in pairs if own < whole}


def longest_chunk(spec: Spec, chunk_nbytes: int) -> int:
    """Bytes of a tensor's chunks, at most: of a shard's, fewer, unless its tensor is large.

    A power of two, so that a master's chunks end where its copy's do.
    """
    if spec.offset is None:
        return chunk_nbytes
    if spec.tiled:
        item = to_numpy(spec.dtype).itemsize
        # As many elements as a master's and its copy's both may have, and have both then.
        wider = max(item, _MASTER_ITEM)
        count = chunk_count(spec.shape, max(chunk_nbytes // wider, 1))
        if count >= min(CHUNK_NBYTES_LEAST // wider, spec.box.count):
            return count * item
    share = max(whole_nbytes(spec) // CHUNKS, 1)
    return min(max(1 << (share.bit_length() - 1), CHUNK_NBYTES_LEAST), chunk_nbytes)


def whole_nbytes(spec: Spec) -> int:
    """Bytes of the whole tensor."""
    return math.prod(spec.full_shape) * to_numpy(spec.dtype).itemsize


def ends(extent: int, ways: Iterable[int]) -> list[int]:
    """Where the parts of even divisions of an axis end, but for its own end: in order.

    Each part has as many as the first, and the last the rest, as torch and JAX divide.
    """
    found: set[int] = set()
    for count in ways:
        step = -(-extent // count)
        found.update(range(step, extent, step) if step else ())
    return sorted(found)


def _between(box: Box, borders: dict[int, set[int]]) -> list[Box]:
    """The parts of a box between borders along some axes, which are the whole tensor's."""
    spans = []
    for axis, (first, last) in enumerate(zip(box.offset, box.end, strict=True)):
        inner = sorted(at for at in borders.get(axis, ()) if first < at < last)
        spans.append(list(itertools.pairwise([first, *inner, last])))
    return [_box(cell) for cell in itertools.product(*spans)]


def _box(cell: Iterable[tuple[int, int]]) -> Box:
    cell = list(cell)
    offset: Shape = tuple(first for first, _ in cell)
    return Box(offset, tuple(last - first for first, last in cell))
