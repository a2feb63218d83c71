"""Read those tiles of a chunk of which something is wanted, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
from gpuckpt.tilecoding import Span, check_run, decode_blocks, tiles_among
from gpuckpt.tileindex import BLOCKS, Records, firsts_nbytes, planes_nbytes, record_type
from gpuckpt.tiling import Grid, box_of, grid_of

Bytes = npt.NDArray[np.uint8]

# Whoever wants more of a chunk reads it as a whole: it takes no longer.
SHARE_MAX = 0.9


def read_tiles(
    job: Job, chunk: ChunkEntry, boxes: Sequence[Box], rooms: Sequence[Bytes], slot: Slot
) -> bool:
    """Bring what some boxes of a chunk's shard have of it to a room each, in C order.

    Each tile is checked.  Uses the slot's `raw`, and its decompressor.  False
    if nothing was read, since the chunk is to be read whole: it has no tiles,
    is sealed as a whole, or most of it is wanted.

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
    wanted = sum(int(grid.starts[last] - grid.starts[first]) for first, last in runs)
    if wanted > SHARE_MAX * int(grid.starts[-1]):
        return False
    places = [
        (box, room.reshape(*box.shape, item)) for box, room in zip(inside, rooms, strict=True)
    ]
    with open_segment(job.store, chunk.extent.segment) as reader:
        tiles = _Tiles(chunk, reader, slot, where_of(job, chunk))
        for first, last in runs:
            raw = tiles.read(first, last)
            for number in range(first, last):
                at = int(grid.starts[number] - grid.starts[first]) * item
                _place(raw[at:], grid.box(number), item, places)
    return True


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
        self._record = record_type(planes)
        self._firsts = self._read(self._index, firsts_nbytes(planes)).view("<u4").tolist()
        coded = [at for at, plane in enumerate(planes) if plane.codec == BLOCKS]
        self._order = {at: k for k, at in enumerate(coded)}  # among those in blocks
        self._first_blocks = {
            at: self._part(at, 0, self._firsts[k]).tobytes() for at, k in self._order.items()
        }
        self._wholes: dict[int, Bytes] = {}

    def read(self, first: int, last: int) -> Bytes:
        """The elements of tiles `first` … `last` - 1, which lie in the slot's `raw`."""
        chunk, starts = self._chunk, self._grid.starts
        item = chunk.nbytes // len(chunk.planes) // int(starts[-1])
        before, records = self._records(first, last)
        span = int(starts[first]) * item, int(starts[last]) * item
        planes = [
            self._plane(at, plane, span, before, records) for at, plane in enumerate(chunk.planes)
        ]
        sizes = self._grid.sizes[first:last] * np.uint32(item)
        check_run(planes, sizes, records, chunk.fingerprint, self._where)
        if len(planes) == 1:
            return planes[0]
        raw = self._slot.raw[: len(planes) * (span[1] - span[0])]
        join(planes, raw, turned=chunk.turned)
        return raw

    def _records(self, first: int, last: int) -> tuple[Sequence[int], Records]:
        """Where the blocks of tile `first` begin in each plane, and the records of some tiles."""
        size, begin = self._record.itemsize, first - (first > 0 and bool(self._firsts))
        place = self._index + firsts_nbytes(self._chunk.planes) + begin * size
        found = self._read(place, (last - begin) * size).view(self._record)
        if begin == first:
            return self._firsts, found
        return found["ends"][0].tolist(), found[1:]

    def _plane(
        self, at: int, plane: Plane, span: tuple[int, int], before: Sequence[int], records: Records
    ) -> Bytes:
        """Some bytes of a plane."""
        if plane.codec == "raw":
            return self._part(at, *span)
        whole = self._chunk.nbytes // len(self._chunk.planes)
        if plane.codec == BLOCKS:
            k = self._order[at]
            blocks = self._part(at, before[k], int(records["ends"][-1, k]))
            first = self._first_blocks[at]
            return decode_blocks(first, blocks, Span(*span, whole), self._slot, self._where)
        if at not in self._wholes:
            coded, room = self._part(at, 0, plane.length), np.empty(whole, np.uint8)
            decode_planes(coded, [plane], self._slot, [room], self._where)
            self._wholes[at] = room
        return self._wholes[at][slice(*span)]

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


def _inside(
    chunk: ChunkEntry, boxes: Sequence[Box], shape: tuple[int, ...], grid: Grid
) -> list[Box]:
    """The boxes of a shard, counted from the first element of its chunk, as far as it has them."""
    count = int(grid.starts[-1])
    first = chunk.start // (chunk.nbytes // count)
    own = box_of(shape, first, first + count)
    assert own is not None, "the manifest's reader has looked"
    found = (box & own for box in boxes)
    return [one.inside(own) for one in found if one is not None]
