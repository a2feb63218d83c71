"""Read those tiles of a chunk of which something is wanted, and no others."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from gpuckpt.arena import Slot
from gpuckpt.boxes import Box
from gpuckpt.coding import decode_planes
from gpuckpt.dtypes import to_numpy
from gpuckpt.errors import CorruptError
from gpuckpt.planes import join
from gpuckpt.reading import Job, derived_name, where_of
from gpuckpt.rounding import MASTER, round_to
from gpuckpt.segments import Reader, open_segment
from gpuckpt.spec import ChunkEntry, Extent, Plane
from gpuckpt.tilecoding import Run, check_run, decode_blocks, tiles_among
from gpuckpt.tileindex import BLOCKS, Records, firsts_nbytes, planes_nbytes, record_type
from gpuckpt.tiling import Grid, box_of, from_tiles, grid_of

Bytes = npt.NDArray[np.uint8]

# Whoever wants more of a chunk reads it as a whole: it takes no longer.
SHARE_MAX = 0.9
# What could be read while one request is made: of a file, and where each request takes long.
_REQUEST_NBYTES, _SLOW_NBYTES = 512, 1 << 20


def read_tiles(
    job: Job, chunk: ChunkEntry, boxes: Sequence[Box], rooms: Sequence[Bytes], slot: Slot
) -> bool:
    """Bring what some boxes of a chunk's shard have of it to a room each, in C order.

    Each tile is checked.  Uses the slot's `raw`, and its decompressor.  False
    if nothing was read, since the chunk is to be read whole: it has no tiles,
    is sealed as a whole, most of it is wanted, or in too many requests.

    Raises:
        CorruptError: names tensor, file and offset.
    """
    if len(chunk.sources) == 1:
        return _round_tiles(job, chunk, boxes, rooms, slot)
    if not chunk.tiles or chunk.digest:
        return False
    grid, item = grid_of(chunk.tiles), to_numpy(job.entry.spec.dtype).itemsize
    inside = _inside(chunk, boxes, job.entry.spec.shape, grid)
    runs = list(tiles_among(grid, inside))
    numbers = np.concatenate([np.arange(*run) for run in runs])
    share = grid.elements(numbers).sum() / math.prod(grid.shape)
    with open_segment(job.store, chunk.extent.segment) as reader:
        each = _SLOW_NBYTES if reader.is_slow else _REQUEST_NBYTES
        requests = (1 + len(runs)) * (1 + len(chunk.planes))
        if share > SHARE_MAX or share * chunk.extent.length + requests * each > _most(chunk, each):
            return False
        raw = _Tiles(chunk, reader, slot, where_of(job, chunk)).read(runs, numbers)
    places = [
        (box, room.reshape(*box.shape, item)) for box, room in zip(inside, rooms, strict=True)
    ]
    if len(places) == 1:
        _put_back(raw, grid, *places[0], item)
        return True
    ends = np.cumsum(grid.elements(numbers)).tolist()
    for number, end in zip(numbers.tolist(), ends, strict=True):
        tile = grid.box(number)
        _place(raw[(end - tile.count) * item :], tile, item, places)
    return True


def check_index(job: Job, chunk: ChunkEntry, slot: Slot) -> None:
    """See that each of a chunk's tiles can be read alone; does nothing to one without tiles.

    Whoever reads the chunk as a whole doesn't look at its index.  Uses the slot as `read_tiles`.

    Raises:
        CorruptError: names tensor, file and offset.
    """
    if not chunk.tiles:
        return
    count = math.prod(map(len, chunk.tiles))
    with open_segment(job.store, chunk.extent.segment) as reader:
        tiles = _Tiles(chunk, reader, slot, where_of(job, chunk))
        tiles.read([(0, count)], np.arange(count))


def _most(chunk: ChunkEntry, each: int) -> int:
    """What a chunk costs that is read whole, in one request of `each`."""
    return chunk.extent.length + each


def _put_back(raw: Bytes, grid: Grid, box: Box, place: Bytes, item: int) -> None:
    """Bring the tiles that have elements of a box, all of them, to it."""
    ends, first = [], []
    for each, begin, last in zip(grid.ends, box.offset, box.end, strict=True):
        low, high = bisect_right(each, begin), bisect_left(each, last)
        first.append(each[low - 1] if low else 0)
        ends.append(tuple(end - first[-1] for end in each[low : high + 1]))
    some = Grid(tuple(ends))
    whole = np.empty(raw.size, np.uint8)
    from_tiles(raw, some, item, whole)
    own = Box(tuple(first), some.shape)
    place[...] = whole.reshape(*some.shape, item)[box.inside(own).slices]


def _round_tiles(
    job: Job, chunk: ChunkEntry, boxes: Sequence[Box], rooms: Sequence[Bytes], slot: Slot
) -> bool:
    """The same of a chunk that is one other rounded."""
    spec, (source,) = job.entry.spec, chunk.sources
    named = replace(spec, name=derived_name(spec), dtype=MASTER)
    master = replace(job, entry=replace(job.entry, spec=named))
    wide = [np.empty(2 * room.size, np.uint8) for room in rooms]
    if not read_tiles(master, source, boxes, wide, slot):
        return False
    for raw, room in zip(wide, rooms, strict=True):
        round_to(spec.dtype, raw, room)
    return True


def _place(raw: Bytes, tile: Box, item: int, places: Sequence[tuple[Box, Bytes]]) -> None:
    """Bring a tile's elements, which `raw` begins with, to the boxes that have some of them."""
    elements = raw[: tile.count * item].reshape(*tile.shape, item)
    for box, place in places:
        both = tile & box
        if both is not None:
            place[both.inside(box).slices] = elements[both.inside(tile).slices]


class _Tiles:
    """The tiles of a chunk in an open segment."""

    def __init__(self, chunk: ChunkEntry, reader: Reader, slot: Slot, where: str) -> None:
        self._chunk, self._reader, self._slot, self._where = chunk, reader, slot, where
        self._grid, planes = grid_of(chunk.tiles), chunk.planes
        lengths = np.cumsum([0, *(plane.length for plane in planes)]).tolist()
        self._begins = [chunk.extent.offset + length for length in lengths[:-1]]
        self._index = chunk.extent.offset + planes_nbytes(chunk)

    def read(self, runs: Sequence[Run], numbers: npt.NDArray[np.int64]) -> Bytes:
        """The elements of runs of tiles, those with these numbers; maybe in the slot's `raw`."""
        chunk, grid = self._chunk, self._grid
        item = chunk.nbytes // len(chunk.planes) // math.prod(grid.shape)
        firsts, records = self._records(runs[-1][1])
        starts = grid.starts
        spans = [(int(starts[a]) * item, int(starts[b]) * item) for a, b in runs]
        planes, coded = list[Bytes](), iter(zip(firsts, records["ends"].T.tolist(), strict=True))
        for at, plane in enumerate(chunk.planes):
            if plane.codec == BLOCKS:
                first, ends = next(coded)
                planes.append(self._blocks(at, [first, *ends], runs, spans))
            else:
                planes.append(self._parts(at, plane, spans))
        sizes = (grid.elements(numbers) * item).astype(np.uint32)
        check_run(planes, sizes, records[numbers], chunk.fingerprint, self._where)
        if len(planes) == 1:
            return planes[0]
        raw = self._slot.raw[: len(planes) * planes[0].size]
        join(planes, raw, turned=chunk.turned)
        return raw

    def _records(self, count: int) -> tuple[list[int], Records]:
        """Where the first block ends in each plane in blocks; the records of the first tiles."""
        planes = self._chunk.planes
        begin, kind = firsts_nbytes(planes), record_type(planes)
        found = self._read(self._index, begin + count * kind.itemsize)
        return found[:begin].view("<u4").tolist(), found[begin:].view(kind)

    def _blocks(
        self, at: int, ends: Sequence[int], runs: Sequence[Run], spans: Sequence[Run]
    ) -> Bytes:
        """Some bytes of a plane in blocks; `ends` are those of its first block and of tiles."""
        places = [(ends[first], ends[last]) for first, last in runs]
        if any(after[0] < before[1] for before, after in pairwise(places)):
            raise CorruptError(self._where, "its tiles' index has tiles in each other")
        whole = self._chunk.nbytes // len(self._chunk.planes)
        beginning = self._part(at, 0, ends[0]).tobytes()
        blocks = [self._part(at, *place) for place in places]
        return decode_blocks((beginning, whole), blocks, spans, self._slot, self._where)

    def _parts(self, at: int, plane: Plane, spans: Sequence[Run]) -> Bytes:
        """Some bytes of another plane."""
        if plane.codec == "raw":
            return _joined([self._part(at, *span) for span in spans])
        whole = np.empty(self._chunk.nbytes // len(self._chunk.planes), np.uint8)
        coded = self._part(at, 0, plane.length)
        decode_planes(coded, [plane], self._slot, [whole], self._where)
        return _joined([whole[slice(*span)] for span in spans])

    def _part(self, at: int, begin: int, end: int) -> Bytes:
        """Bytes of a plane as it is coded."""
        if not 0 <= begin <= end <= self._chunk.planes[at].length:
            raise CorruptError(self._where, "its tiles' index names what isn't its own")
        return self._read(self._begins[at] + begin, end - begin)

    def _read(self, offset: int, length: int) -> Bytes:
        room = np.empty(length, np.uint8)
        for _ in self._reader.read(Extent(self._chunk.extent.segment, offset, length), room):
            pass
        return room


def _joined(parts: Sequence[Bytes]) -> Bytes:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _inside(
    chunk: ChunkEntry, boxes: Sequence[Box], shape: tuple[int, ...], grid: Grid
) -> list[Box]:
    """The boxes of a shard, counted from the first element of its chunk, as far as it has them."""
    count = math.prod(grid.shape)
    first = chunk.start // (chunk.nbytes // count)
    own = box_of(shape, first, first + count)
    assert own is not None, "the manifest's reader has looked"
    found = (box & own for box in boxes)
    return [one.inside(own) for one in found if one is not None]
