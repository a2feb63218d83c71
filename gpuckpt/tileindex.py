"""The index of a chunk's tiles, and what a chunk's row says of them; nothing in it is trusted."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuckpt.dtypes import to_numpy
from gpuckpt.spec import ChunkEntry, Ends, Plane, Spec
from gpuckpt.tiling import TILE_NBYTES_MAX, Checks, Counts, box_of
from gpuckpt.values import Json

# A zstd frame of which each tile's blocks can be decoded with the first one alone.
BLOCKS = "blocks"

# An index that any chunk may have.
_INDEX_NBYTES = 64 << 10
_FINGERPRINT = re.compile("[0-9a-f]{32}")

Records = npt.NDArray[Any]


def record_type(planes: Sequence[Plane]) -> np.dtype[Any]:
    """A tile's record: its check, and where it ends in each plane in blocks."""
    coded = sum(plane.codec == BLOCKS for plane in planes)
    return np.dtype([("check", "<u8"), ("ends", "<u4", (coded,))])


def firsts_nbytes(planes: Sequence[Plane]) -> int:
    """Bytes before the first record: where the first block ends in each plane in blocks."""
    return 4 * sum(plane.codec == BLOCKS for plane in planes)


def index_nbytes(planes: Sequence[Plane], tiles: Ends) -> int:
    """Bytes of an index, which follows its chunk's planes."""
    count = math.prod(len(each) for each in tiles)
    return firsts_nbytes(planes) + count * record_type(planes).itemsize


def index_nbytes_max(nbytes: int) -> int:
    """Bytes of the longest index of tiles that a chunk of `nbytes` may have."""
    return max(nbytes, _INDEX_NBYTES)


def planes_nbytes(chunk: ChunkEntry) -> int:
    """Bytes of a chunk's extent that are its planes."""
    return sum(plane.length for plane in chunk.planes)


def joined_checks(checks: Sequence[Checks], fingerprint: str) -> Checks:
    """A tile's check, of those of its part of each plane, and of the chunk that it belongs to."""
    found = np.full(checks[0].size, int(fingerprint[:16], 16), np.uint64)
    for k, each in enumerate(checks):
        found += each * np.uint64(2 * k + 1)
    return found


def pack_index(
    planes: Sequence[Plane], checks: Sequence[Checks], ends: Sequence[Counts], fingerprint: str
) -> bytes:
    """The index of tiles with these checks of each plane, and these ends in each in blocks.

    The first of a plane's ends is that of its first block.
    """
    records = np.empty(checks[0].size, record_type(planes))
    records["check"] = joined_checks(checks, fingerprint)
    if ends:
        records["ends"] = np.stack([each[1:] for each in ends], axis=1)
    return np.array([each[0] for each in ends], "<u4").tobytes() + records.tobytes()


def pack_tiles(chunk: ChunkEntry) -> dict[str, Json]:
    """What a chunk's row says of its tiles."""
    return {"tiles": [list(each) for each in chunk.tiles], "turned": chunk.turned}


def unpack_tiles(row: Json) -> tuple[Ends, bool]:
    """Read it: the inverse of `pack_tiles`.  Whether it fits the chunk isn't known yet.

    Raises:
        ValueError: these are no ends.
        TypeError: nor numbers.
    """
    tiles = tuple(tuple(each) for each in row["tiles"])
    if any(type(end) is not int for each in tiles for end in each):
        raise TypeError("tiles that end at what isn't an integer")
    if not all(each and _ascends(each) for each in tiles):
        raise ValueError("tiles that don't follow each other")
    if type(row["turned"]) is not bool:
        raise TypeError("turned, or not?")
    return tiles, row["turned"]


def check_tiling(spec: Spec, chunk: ChunkEntry) -> None:
    """See that a chunk's tiles are parts of it.

    Raises:
        ValueError: they aren't.
    """
    item = to_numpy(spec.dtype).itemsize
    if chunk.start + chunk.nbytes > spec.nbytes:
        raise ValueError(f"{spec.name}: tiles of a chunk that ends after its tensor")
    if index_nbytes(chunk.planes, chunk.tiles) > index_nbytes_max(chunk.nbytes):
        raise ValueError(f"{spec.name}: a longer index of tiles than of any use")
    if not _FINGERPRINT.fullmatch(chunk.fingerprint):
        raise ValueError(f"{spec.name}: {chunk.fingerprint!r} isn't a fingerprint")
    box = box_of(spec.shape, chunk.start // item, (chunk.start + chunk.nbytes) // item)
    if box is None or box.shape != tuple(each[-1] for each in chunk.tiles):
        raise ValueError(f"{spec.name}: tiles of a chunk that isn't such a box")
    spans = (max(b - a for a, b in pairwise((0, *each))) for each in chunk.tiles)
    if math.prod(spans) * item > TILE_NBYTES_MAX:
        raise ValueError(f"{spec.name}: a tile of more than {TILE_NBYTES_MAX} bytes")
    if chunk.base is not None or any(plane.parts for plane in chunk.planes):
        raise ValueError(f"{spec.name}: a delta in tiles, or a sparse plane")


def _ascends(each: Sequence[int]) -> bool:
    return all(a < b for a, b in pairwise((0, *each)))
