"""Long chunks of Orbax's arrays, decoded a little at a time: TensorStore takes each as a whole.

Orbax stores an array, or one device's shard, as one chunk, however long.  As zarr 2
that is one value, a zstd frame or the bare elements; as zarr 3 a shard of such
chunks, behind which an index says where each begins and how long it is.  TensorStore
still finds the values, in OCDBT or in folders, and reads what is asked for of them.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import zstandard

from gpuckpt.boxes import Box, Shape
from gpuckpt.conversion.port import PART_NBYTES
from gpuckpt.conversion.slabs import slabs
from gpuckpt.stores import Buffer, Bytes

# What is read, and written, of an array at a time.
SLAB_NBYTES = 2 * PART_NBYTES
_READ_NBYTES = 256 << 10
_WINDOW_NBYTES_MAX = 128 << 20  # of a zstd frame
_ENTRY_NBYTES = 16  # of a shard's index: where a chunk begins, and its length
_CRC_NBYTES = 4
_MISSING = (1 << 64) - 1
_BARE = frozenset(("|b1", "|u1", "|i1", "bfloat16"))  # with those that begin with `<` or `float8`


@dataclass(frozen=True, slots=True)
class Grid:
    """How an array is cut, and where a chunk is stored.

    `shard` is that of the values, `chunk` that of what is encoded by itself in
    them, which are the same but in zarr 3.  `footer_nbytes` is an index's length.
    """

    shard: Shape
    chunk: Shape
    prefix: str
    separator: str
    is_zstd: bool
    footer_nbytes: int | None

    def key(self, at: Shape) -> str:
        """The value's name that has the chunk at a place of the grid."""
        shards = (i * n // m for i, n, m in zip(at, self.chunk, self.shard, strict=True))
        numbers = list(map(str, shards))
        if self.prefix:
            return self.separator.join([self.prefix, *numbers])
        return self.separator.join(numbers) if numbers else "0"


def grid_of(array: Any) -> Grid | None:
    """How an array of TensorStore's is stored; None if only TensorStore can tell.

    Or if chunks may be missing, or are longer than the array along an axis.
    """
    found = array.spec().to_json()
    if found.get("fill_missing_data_reads", True):
        return None
    try:
        grid = _zarr2(found["metadata"]) if found["driver"] == "zarr" else _zarr3(found["metadata"])
    except (KeyError, TypeError, ValueError):
        return None
    if grid is None or any(n > m for n, m in zip(grid.chunk, array.shape, strict=True)):
        return None
    return grid


def _zarr2(metadata: Any) -> Grid | None:
    dtype, compressor = metadata["dtype"], metadata["compressor"]
    is_plain = dtype in _BARE or dtype.startswith(("<", "float8"))
    if not is_plain or metadata["order"] != "C" or metadata["filters"]:
        return None
    if compressor is not None and compressor["id"] != "zstd":
        return None
    chunk = tuple(metadata["chunks"])
    return Grid(chunk, chunk, "", metadata["dimension_separator"], compressor is not None, None)


def _zarr3(metadata: Any) -> Grid | None:
    shard = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
    encoding = metadata["chunk_key_encoding"]
    codecs, chunk, footer = metadata["codecs"], shard, None
    if encoding["name"] != "default" or metadata["chunk_grid"]["name"] != "regular":
        return None
    if [one["name"] for one in codecs] == ["sharding_indexed"]:
        facts = codecs[0]["configuration"]
        codecs, chunk = facts["codecs"], tuple(facts["chunk_shape"])
        index = [one["name"] for one in facts["index_codecs"]]
        if facts["index_location"] != "end" or index not in (["bytes"], ["bytes", "crc32c"]):
            return None
        count = math.prod(n // m for n, m in zip(shard, chunk, strict=True))
        footer = count * _ENTRY_NBYTES + _CRC_NBYTES * (len(index) - 1)
    names = [one["name"] for one in codecs]
    little = codecs[0].get("configuration", {}).get("endian", "little") == "little"
    if names not in (["bytes"], ["bytes", "zstd"]) or not little:
        return None
    separator = encoding.get("configuration", {}).get("separator", "/")
    return Grid(shard, chunk, "c", separator, "zstd" in names, footer)


def read_slabs(array: Any, item_nbytes: int, most_nbytes: int = SLAB_NBYTES) -> Iterator[Bytes]:
    """An array's bytes in C order, at most so many at a time.

    TensorStore reads it if it decodes no chunk for more than one slab so; else
    chunks are decoded a little at a time.  Where that can't be, there are as many
    rows at a time as are stored together, at least.
    """
    shape, chunk = tuple(array.shape), tuple(array.chunk_layout.read_chunk.shape or ())
    boxes = functools.partial(slabs, shape, item_nbytes, most_nbytes)
    first = next(boxes(), None)
    if first is None:
        return
    if all(n == m or n % by == 0 for n, by, m in zip(first.shape, chunk, shape, strict=True)):
        for box in boxes():
            yield _bytes_of(array[box.slices])
    elif (grid := grid_of(array)) is not None:
        yield from map(Chunks(array, grid, item_nbytes).gather, boxes())
    else:
        rows = max(first.shape[0], chunk[0])
        for at in range(0, shape[0], rows):
            yield _bytes_of(array[at : min(at + rows, shape[0])])


def _bytes_of(array: Any) -> Bytes:
    return np.ascontiguousarray(array.read().result()).reshape(-1).view(np.uint8)


class Chunks:
    """An array's chunks, each opened when it is first wanted, and closed after its last element."""

    def __init__(self, array: Any, grid: Grid, item_nbytes: int) -> None:
        self._values, self._grid, self._item = array.kvstore, grid, item_nbytes
        self._shape = tuple(array.shape)
        self._open: dict[Shape, tuple[Box, _Chunk]] = {}
        self._index = functools.lru_cache(maxsize=64)(self._read_index)

    def gather(self, slab: Box) -> Bytes:
        """The elements of a slab; the slabs of an array are asked for one after the other.

        Raises:
            LookupError: a chunk isn't there.
            ValueError: one isn't as long as it should be.
        """
        room = np.empty((*slab.shape, self._item), np.uint8)
        for at in self._under(slab):
            if at not in self._open:
                self._open[at] = self._box(at), _Chunk(self._file(at), self._grid.chunk, self._item)
            box, chunk = self._open[at]
            common = box & slab
            assert common is not None, (box, slab)
            room[common.inside(slab).slices] = chunk.take(common.inside(box))
            if common.end == box.end:
                chunk.end()
                del self._open[at]
        return room.reshape(-1)

    def _under(self, slab: Box) -> Iterator[Shape]:
        """The places in the grid of all chunks that have elements of a slab."""
        ranges = (
            range(first // extent, (last - 1) // extent + 1)
            for first, last, extent in zip(slab.offset, slab.end, self._grid.chunk, strict=True)
        )
        return itertools.product(*ranges)

    def _box(self, at: Shape) -> Box:
        """What of a chunk is in the array: those at its edges have more."""
        offset = tuple(i * n for i, n in zip(at, self._grid.chunk, strict=True))
        extents = zip(offset, self._grid.chunk, self._shape, strict=True)
        return Box(offset, tuple(min(n, extent - first) for first, n, extent in extents))

    def _file(self, at: Shape) -> IO[bytes]:
        key, begin, end = self._grid.key(at), 0, None
        if self._grid.footer_nbytes is not None:
            shard = (n // m for n, m in zip(self._grid.shard, self._grid.chunk, strict=True))
            place = tuple(i % n for i, n in zip(at, shard, strict=True))
            first, nbytes = (int(one) for one in self._index(key)[place])
            if first == _MISSING:
                raise LookupError(f"chunk {at} of {key} isn't there")
            begin, end = first, first + nbytes
        raw = io.BufferedReader(_Value(self._values, key, begin, end), _READ_NBYTES)
        if not self._grid.is_zstd:
            return raw
        decoder = zstandard.ZstdDecompressor(max_window_size=_WINDOW_NBYTES_MAX)
        return decoder.stream_reader(raw, read_size=_READ_NBYTES)

    def _read_index(self, key: str) -> npt.NDArray[np.uint64]:
        grid, nbytes = self._grid, self._grid.footer_nbytes or 0
        shape = tuple(n // m for n, m in zip(grid.shard, grid.chunk, strict=True))
        data = _value(self._values, key, slice(-nbytes, None))
        return np.frombuffer(data, "<u8", math.prod(shape) * 2).reshape(*shape, 2)


class _Chunk:
    """A chunk's elements, in C order."""

    def __init__(self, file: IO[bytes], shape: Shape, item_nbytes: int) -> None:
        """`shape` is that of all which is stored."""
        self._file, self._done = file, 0
        self._shape, self._item = shape, item_nbytes
        strides = [item_nbytes * math.prod(shape[at + 1 :]) for at in range(len(shape))]
        self._strides = tuple(strides)

    def take(self, box: Box) -> Bytes:
        """The elements of a box, which follows those before in C order; and skip what is between.

        That is more than the box only where the chunk is longer than what is in the array.
        """
        first = self._place(box.offset)
        last = self._place(tuple(end - 1 for end in box.end)) + self._item
        self._skip(first - self._done)
        raw = np.empty(last - first, np.uint8)
        self._fill(raw)
        shape, strides = (*box.shape, self._item), (*self._strides, 1)
        return np.lib.stride_tricks.as_strided(raw, shape, strides)

    def end(self) -> None:
        """See that nothing follows but what isn't in the array."""
        self._skip(math.prod(self._shape) * self._item - self._done)
        if self._file.read(1):
            raise ValueError("a chunk is longer than its shape")
        self._file.close()

    def _place(self, at: Shape) -> int:
        return sum(i * by for i, by in zip(at, self._strides, strict=True))

    def _skip(self, nbytes: int) -> None:
        while nbytes:
            room = np.empty(min(nbytes, _READ_NBYTES), np.uint8)
            self._fill(room)
            nbytes -= room.size

    def _fill(self, room: Bytes) -> None:
        at = 0
        while at < room.size:
            count = self._file.readinto(room[at:].data)  # type: ignore[attr-defined]
            if not count:
                raise ValueError("a chunk is shorter than its shape")
            at += count
        self._done += room.size


class _Value(io.RawIOBase):
    """A value of TensorStore's key-value stores, or some bytes in it, as a file."""

    def __init__(self, values: Any, key: str, begin: int, end: int | None) -> None:
        self._values, self._key = values, key
        self._at, self._end = begin, end

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Buffer) -> int:  # type: ignore[override]
        """The next bytes."""
        view = memoryview(buffer).cast("B")
        data = self._next(view.nbytes)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _next(self, count: int) -> bytes:
        if self._end is not None:
            count = min(count, self._end - self._at)
            return _value(self._values, self._key, slice(self._at, self._at + count))
        try:
            return _value(self._values, self._key, slice(self._at, self._at + count))
        except ValueError:  # it ends before; how long it is, nothing tells
            return _value(self._values, self._key, slice(self._at, None))


def _value(values: Any, key: str, part: slice) -> bytes:
    found = values.read(key, byte_range=part).result()
    if found.state != "value":
        raise LookupError(f"{key} isn't there")
    return bytes(found.value)
