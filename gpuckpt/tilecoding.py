"""Encode and decode chunks in tiles: planes of their elements tile by tile, and an index.

The index says where each tile's bytes are in planes that are coded, and has a
check of each tile, so that some tiles can be read without the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from gpuckpt.arena import Slot
from gpuckpt.boxes import Box
from gpuckpt.coding import WORTHWHILE, Encoded, compress, decode, decode_planes, is_in_runs
from gpuckpt.errors import CorruptError
from gpuckpt.native import native_for
from gpuckpt.planes import join
from gpuckpt.spec import ChunkEntry, Ends, Plane
from gpuckpt.tileindex import BLOCKS, Records, joined_checks, pack_index, planes_nbytes
from gpuckpt.tiling import Checks, Counts, Grid, check_tiles, from_tiles, grid_of, to_tiles

Bytes = npt.NDArray[np.uint8]
# Of tiles, by their numbers, or of bytes: the first, and after the last.
Run = tuple[int, int]

# Of a frame in blocks: its magic number and window, the length of what it has, and bytes of its
# first block, which has the codes of all.
_BEGINNING, _LENGTH, _FIRST = bytes.fromhex("28b52ffd8020"), 4, 64
# A block without bytes that says that it is the last.
_END = bytes.fromhex("010000")
_NO_ENDS = np.zeros(0, np.uint32)


def encode_tiles(
    planes: Sequence[Bytes],
    tries: Sequence[bool],
    tiles: Ends,
    room: tuple[Slot, Slot],
    fingerprint: str,
    *,
    turned: bool,
) -> Encoded:
    """Encode a chunk in tiles: its planes, or it alone, whole, in C order.

    `tries` are the planes to be compressed.  `room` is the chunk's slot, to
    whose `coded` goes what is encoded, and a spare, all of which is used; what
    is given lies in neither.
    """
    (slot, spare), grid = room, grid_of(tiles)
    nbytes = sum(plane.size for plane in planes)
    item = nbytes // len(planes) // int(grid.starts[-1])
    sizes, coded, parts = grid.sizes * np.uint32(item), slot.coded, list[memoryview]()
    entries, checks, ends = list[Plane](), list[Checks](), list[Counts]()
    for plane, worth_trying in zip(planes, tries, strict=True):
        tiled = spare.raw[: plane.size] if worth_trying else coded[: plane.size]
        to_tiles(plane, grid, item, tiled)
        checks.append(check_tiles(tiled, sizes))
        entry, where = _encode_plane(tiled, sizes, coded, slot, worth_trying=worth_trying)
        ends += [where] if entry.codec == BLOCKS else []
        entries.append(entry)
        parts.append(coded[: entry.length].data)
        coded = coded[entry.length :]
    if len(planes) > 1 and all(entry.codec == "raw" for entry in entries):
        whole = spare.planes[:nbytes]
        join(planes, whole, turned=turned)
        return encode_tiles([whole], [False], tiles, room, fingerprint, turned=False)
    parts.append(memoryview(pack_index(entries, checks, ends, fingerprint)))
    return Encoded(tuple(entries), tuple(parts), turned, tiles)


def _encode_plane(
    plane: Bytes, sizes: Counts, room: Bytes, slot: Slot, *, worth_trying: bool
) -> tuple[Plane, Counts]:
    """Write a plane's frame to `room`, if that is worthwhile, in blocks if that can be.

    Else the plane, unless nothing is to be tried: then it lies there.
    """
    length, most = 0, min(int(plane.size * WORTHWHILE), room.size)
    loops = native_for(1, plane, room)
    if worth_trying and loops is not None and not is_in_runs(plane, loops):
        length, ends = loops.huffman_tiles(plane, sizes, room[:most])
        if length:
            return Plane(BLOCKS, length), ends
    length = compress(plane, room, slot.compressor) if worth_trying else 0
    if length:
        return Plane("zstd", length), _NO_ENDS
    if worth_trying:
        np.copyto(room[: plane.size], plane)
    return Plane("raw", plane.size), _NO_ENDS


def decode_tiles(
    coded: Bytes, chunk: ChunkEntry, room: tuple[Slot, Slot], rooms: Sequence[Bytes], where: str
) -> None:
    """Decode a chunk in tiles, in C order: undoes `encode_tiles`.

    Into a room for each plane or, if there is only one, joined.  Uses the
    `planes` of the one slot in `room`, and the `raw` of the other.
    """
    grid, planes = grid_of(chunk.tiles), coded[: planes_nbytes(chunk)]
    slot, spare = room
    tiled = spare.raw[: chunk.nbytes].reshape(len(rooms), -1)
    if [plane.codec for plane in chunk.planes] == ["raw"] and planes.size == chunk.nbytes:
        tiled = planes.reshape(1, -1)
    else:
        decode(planes, chunk.planes, slot, list(tiled), where, turned=chunk.turned)
    for given, place in zip(tiled, rooms, strict=True):
        from_tiles(given, grid, given.size // int(grid.starts[-1]), place)


def decode_blocks(
    plane: tuple[bytes, int],
    blocks: Sequence[Bytes],
    spans: Sequence[Run],
    slot: Slot,
    where: str,
) -> Bytes:
    """Some spans of a plane, which ascend, one after the other: a new array.

    `plane` is how its frame begins, up to the end of the first block, and how
    many bytes it has; `blocks` are those of the tiles that each span is.

    Raises:
        CorruptError: they aren't, or don't decode to so many bytes.
    """
    first, whole = plane
    after = len(_BEGINNING) + _LENGTH
    if first[: len(_BEGINNING)] != _BEGINNING or len(first) < after:
        raise CorruptError(where, "not a frame in blocks")
    nbytes = _FIRST + sum(max(end, _FIRST) - max(begin, _FIRST) for begin, end in spans)
    head = _BEGINNING + nbytes.to_bytes(_LENGTH, "little") + first[after:]
    last = b"" if spans[-1][1] == whole else _END
    text = b"".join([head, *(each.data for each in blocks), last])
    room = np.empty(nbytes, np.uint8)
    decode_planes(np.frombuffer(text, np.uint8), [Plane("zstd", len(text))], slot, [room], where)
    inside = [room[begin : min(end, _FIRST)] for begin, end in spans if begin < _FIRST]
    return np.concatenate([*inside, room[_FIRST:]])


def check_run(
    planes: Sequence[Bytes], sizes: Counts, records: Records, fingerprint: str, where: str
) -> None:
    """See that some tiles' planes are those that an index has checks of.

    Raises:
        CorruptError: they aren't.
    """
    found = joined_checks([check_tiles(plane, sizes) for plane in planes], fingerprint)
    if not np.array_equal(found, records["check"]):
        raise CorruptError(where, "a tile's check isn't that of its bytes")


def tiles_among(grid: Grid, boxes: Sequence[Box]) -> Iterator[Run]:
    """Runs of the numbers of tiles that have elements of some boxes of the chunk."""
    found = np.unique(np.concatenate([grid.among(box) for box in boxes]))
    breaks = np.flatnonzero(np.diff(found) != 1)
    firsts = [0, *(breaks + 1).tolist()]
    for first, last in zip(firsts, [*breaks.tolist(), found.size - 1], strict=True):
        yield int(found[first]), int(found[last]) + 1
