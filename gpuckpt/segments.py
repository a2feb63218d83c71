"""Write encoded chunks to segments, and read them back.

A segment is a header, chunks back to back, an index of them, and a trailer
that says where the index is: so that it can be read without a manifest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import zstandard

from gpuckpt import layout
from gpuckpt.entries import check_features, pack_body, unpack_digests
from gpuckpt.errors import AuthenticationError, CheckpointError, CorruptError, FormatError
from gpuckpt.fingerprint import checksum128
from gpuckpt.manifest import NOT_AS_EXPECTED
from gpuckpt.seal import INDEX, Seal
from gpuckpt.spans import Lap
from gpuckpt.spec import Extent
from gpuckpt.stores import Ahead, Appender, Bytes, File, Opens, Parts, Seeing, Store
from gpuckpt.tensors import (
    TensorEntry,
    check_segment,
    chunks_of,
    features_in,
    pack_tensors,
    segments_of,
    unpack_tensors,
)
from gpuckpt.values import parse_json

# A part is still in a core's own cache when it is looked at for the second time.
PART_NBYTES = 256 << 10


class Writer:
    """Segments of one save, one after the other; `finish` makes them durable."""

    def __init__(self, store: Store, name: Callable[[int], str], *, segment_nbytes: int) -> None:
        """`name` gives the file name of the first, second, … segment."""
        self._store, self._name, self._segment_nbytes = store, name, segment_nbytes
        self._open: list[tuple[str, Appender]] = []
        self.cpu_seconds = 0.0  # of the store's own threads, once finished

    @property
    def names(self) -> list[str]:
        """The segments begun so far."""
        return [name for name, _ in self._open]

    @property
    def waiting_nbytes(self) -> int:
        """Bytes taken that the storage's threads are still to write; any thread may ask."""
        return sum(file.waiting_nbytes for _, file in tuple(self._open))

    def write(self, chunks: Iterable[Sequence[memoryview]]) -> list[Extent]:
        """Append chunks, each in parts, by as few writes as can be; where they lie.

        The parts' memory is the caller's again on return.
        """
        extents: list[Extent] = []
        waiting: list[memoryview] = []
        ahead = 0  # bytes that wait
        for parts in chunks:
            length = parts[0].nbytes if len(parts) == 1 else sum(part.nbytes for part in parts)
            if not self._fits(ahead + length):
                self._append(waiting)
                waiting, ahead = [], 0
                self._begin()
            name, file = self._open[-1]
            extents.append(Extent(name, file.offset + ahead, length))
            waiting += parts
            ahead += length
        self._append(waiting)
        return extents

    def finish(
        self,
        tensors: Sequence[TensorEntry],
        step: int,
        lap: Lap | None = None,
        seal: Seal | None = None,
    ) -> None:
        """Give each segment its index and make its contents durable (their names aren't yet).

        `lap` is told when the one and the other was done; `seal` seals the indices.
        """
        lap = lap or Lap()
        for name, file in self._open:
            _append_index(file, name, tensors, step, seal)
            lap.mark("index")
            file.sync()
            file.close()
            self.cpu_seconds += file.cpu_seconds
            lap.mark("sync")

    def abandon(self) -> None:
        """Delete what was written, as far as the storage lets us; leaves nothing open.

        Raises nothing: the error that led here matters more, and what is left
        is swept away at the next start.
        """
        for name, file in self._open:
            for undo in (file.close, partial(self._store.remove, name)):
                with contextlib.suppress(CheckpointError):
                    undo()

    def _fits(self, nbytes: int) -> bool:
        """Whether the last segment has room for so much more; an empty one has for anything."""
        if not self._open:
            return False
        offset = self._open[-1][1].offset
        return offset + nbytes <= self._segment_nbytes or offset == layout.HEADER.size

    def _begin(self) -> None:
        name = self._name(len(self._open))
        file = self._store.create(name)
        self._open.append((name, file))
        file.append([layout.pack_header()])

    def _append(self, parts: Sequence[memoryview]) -> None:
        if parts:
            self._open[-1][1].append(parts)


class Reader:
    """A segment that is open for reading: its chunks' encoded bytes, part by part."""

    def __init__(self, file: File) -> None:
        """`file` stays the caller's."""
        self._file = file
        # Where each request takes long, a chunk is asked for as a whole.
        self._ahead = cast(Ahead, file) if hasattr(file, "expect") else None
        self._parts = cast(Parts, file) if hasattr(file, "read_parts") else None
        self._seeing = cast(Seeing, file) if hasattr(file, "read_seen") else None

    @property
    def is_slow(self) -> bool:
        """Whether each request takes long."""
        return self._ahead is not None

    def expect(self, extents: Sequence[Extent]) -> None:
        """Tell that these will be read, one after the other; where requests are slow, in one."""
        if self._ahead is None or len(extents) < 2:
            return
        begin = min(extent.offset for extent in extents)
        end = max(extent.offset + extent.length for extent in extents)
        # What lies between them would be read in vain.
        if end - begin <= 2 * sum(extent.length for extent in extents):
            self._ahead.expect(begin, end - begin)

    def read(self, extent: Extent, room: Bytes) -> Iterator[memoryview]:
        """Bring a chunk's encoded bytes to `room`, which has their length: undoes `Writer.write`.

        Yields each part once it is there, so that who looks at it has it from
        the processor's cache.
        """
        assert room.nbytes == extent.length, (room.nbytes, extent)
        view = room.data
        if self._ahead is not None:
            self._file.read_into(extent.offset, view)
        for at in range(0, extent.length, PART_NBYTES):
            part = view[at : at + PART_NBYTES]
            if self._ahead is None:
                self._file.read_into(extent.offset + at, part)
            yield part

    def read_seen(self, extent: Extent, room: Bytes) -> tuple[bytes, int] | None:
        """As `read`, all of it, with its leaves' digests and its check value.

        None: nothing was read, since the file can't do so.
        """
        assert room.nbytes == extent.length, (room.nbytes, extent)
        return None if self._seeing is None else self._seeing.read_seen(extent.offset, room)

    def read_small(self, extents: Sequence[Extent], rooms: Sequence[Bytes]) -> None:
        """As `read`, of chunks that needn't be looked at part by part; by few requests."""
        if self._parts is None:
            for extent, room in zip(extents, rooms, strict=True):
                self._file.read_into(extent.offset, room.data)
            return
        views: list[memoryview] = []
        begin = end = 0
        for extent, room in zip(extents, rooms, strict=True):
            assert room.nbytes == extent.length, (room.nbytes, extent)
            if views and extent.offset != end:
                self._parts.read_parts(begin, views)
                views = []
            begin = begin if views else extent.offset
            end = extent.offset + extent.length
            views.append(room.data)
        self._parts.read_parts(begin, views)


@contextlib.contextmanager
def open_segment(store: Store, name: str) -> Iterator[Reader]:
    """Open a segment until the end of the block."""
    if hasattr(store, "open"):  # `isinstance` of a protocol takes long
        with cast(Opens, store).open(name) as file:
            yield Reader(file)
    else:
        yield Reader(_Unopened(store, name))


@dataclass(frozen=True, slots=True)
class _Unopened:
    """A file of a store that opens none."""

    store: Store
    name: str

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.store.read_into(self.name, offset, buffer)


def data_nbytes(store: Store, name: str) -> int:
    """Bytes of a segment's chunks, as its trailer says.

    Raises:
        CheckpointError: it isn't there, or not a segment.
    """
    return read_trailer(store, name).offset - layout.HEADER.size


def read_trailer(store: Store, name: str) -> layout.SegmentTrailer:
    """Where a segment's index lies.

    Raises:
        CheckpointError: it isn't there, or not a segment.
    """
    where = f"{store.root}/{name}"
    end = store.size(name) - layout.TRAILER.size
    if end < layout.HEADER.size:
        raise FormatError(f"{where}: not a gpuckpt segment")
    return layout.unpack_trailer(_read(store, name, end, layout.TRAILER.size), where)


def read_index(
    store: Store, name: str, seal: Seal | None = None
) -> tuple[int, tuple[TensorEntry, ...]]:
    """The step of a segment, and those chunks of its tensors that it holds: undoes `finish`.

    Raises:
        CorruptError: the index isn't what was written.
        AuthenticationError: it isn't sealed with the key of `seal`, or under another name.
        FormatError: not a segment, or written by a newer gpuckpt.
    """
    nbytes = store.size(name)
    where = f"{store.root}/{name}"
    if nbytes < layout.HEADER.size + layout.TRAILER.size:
        raise FormatError(f"{where}: not a gpuckpt segment")
    layout.check_header(_read(store, name, 0, layout.HEADER.size), where)
    end = nbytes - layout.TRAILER.size
    trailer = layout.unpack_trailer(_read(store, name, end, layout.TRAILER.size), where)
    longest = max(trailer.length, trailer.raw_length)
    if trailer.offset + trailer.length != end or longest > layout.INDEX_NBYTES_MAX:
        raise CorruptError(where, "its trailer doesn't fit the file")
    packed = _read(store, name, trailer.offset, trailer.length)
    if checksum128(packed) != trailer.checksum.hex():
        raise CorruptError(where, "its index's checksum doesn't fit")
    try:
        if zstandard.frame_content_size(packed) != trailer.raw_length:
            raise ValueError("its length isn't the trailer's")
        text = zstandard.decompress(packed, max_output_size=trailer.raw_length)
        if seal is not None:
            seal.check(text, INDEX, where)
        body = parse_json(text)
        # Extents are in this file, whatever it was called when it was written, or are bases'.
        check_features(body.get("requires", []), where)
        files = [name, *(check_segment(other) for other in body.get("bases", ()))]
        digests = None if seal is None else unpack_digests(body["digests"], files)
        tensors = unpack_tensors(body["tensors"], files, digests, whole=False)
        if any(chunk.extent.segment != name for entry in tensors for chunk in entry.chunks):
            raise ValueError("it lists a chunk of another file")
        if seal is not None and body["segment"] != name:
            raise AuthenticationError(where, f"it is {body['segment']!r}", "give it that name")
        return layout.check_step(body["step"]), tensors
    except (*NOT_AS_EXPECTED, zstandard.ZstdError) as error:
        raise CorruptError(where, f"not an index ({error})") from error


def _append_index(
    file: Appender, name: str, tensors: Sequence[TensorEntry], step: int, seal: Seal | None
) -> None:
    own = []
    for entry in tensors:
        chunks = tuple([chunk for chunk in entry.chunks if chunk.extent.segment == name])
        if chunks:
            own.append(TensorEntry(entry.spec, chunks, entry.version))
    files = list(dict.fromkeys([name, *segments_of(own)]))
    body = {"segment": name, "step": step, "tensors": pack_tensors(own, files)}
    if features := features_in(own):
        body |= {"requires": features, "bases": files[1:]}
    text = pack_body(body, chunks_of(own), files, seal, INDEX)
    packed = zstandard.compress(text, 3)
    digest = bytes.fromhex(checksum128(packed))
    trailer = layout.SegmentTrailer(file.offset, len(packed), len(text), digest)
    file.append([packed, layout.pack_trailer(trailer)])


def _read(store: Store, name: str, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    store.read_into(name, offset, memoryview(buffer))
    return bytes(buffer)
