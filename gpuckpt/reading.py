"""Read and decode chunks, with their bases, and check each byte on its way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, groupby

import numpy as np
import numpy.typing as npt

from gpuckpt.arena import Arena, Slot
from gpuckpt.arrays import Tensor
from gpuckpt.coding import decode
from gpuckpt.deltacoding import decode_delta
from gpuckpt.errors import AuthenticationError, CorruptError
from gpuckpt.fingerprint import checks_of, checksum, leaf_digests, root
from gpuckpt.layout import LEAF_NBYTES
from gpuckpt.record import record
from gpuckpt.rounding import MASTER, round_to
from gpuckpt.segments import PART_NBYTES, Reader, open_segment
from gpuckpt.spec import ChunkEntry, Extent, Spec
from gpuckpt.stores import Store
from gpuckpt.tensors import TensorEntry
from gpuckpt.tilecoding import decode_tiles
from gpuckpt.tileindex import planes_nbytes

Bytes = npt.NDArray[np.uint8]


@record(frozen=True, slots=True)
class Job:
    """A tensor of a checkpoint or a shard of one, and the tensors to fill with its bytes.

    A target is of the same box (`Spec.box`), or of a part of it.
    """

    store: Store
    entry: TensorEntry
    targets: tuple[Tensor, ...]


@record(frozen=True, slots=True)
class Wanted:
    """A chunk to be read, and where its bytes belong: a room for each plane, or one for all.

    `looked_at` says whether the fingerprint of its one room is wanted, `made`
    that the room holds the bytes already.
    """

    job: Job
    chunk: ChunkEntry
    rooms: Sequence[Bytes]
    looked_at: bool = True
    made: bool = False


class _Leaves:
    """The fingerprint of bytes that arrive part by part, whole leaves but for the last."""

    def __init__(self, *, wanted: bool) -> None:
        self._digests: list[bytes] | None = [] if wanted else None

    def note(self, part: memoryview) -> None:
        """Look at the next part."""
        if self._digests is not None:
            self._digests.append(leaf_digests(part))

    def take(self, digests: bytes) -> None:
        """The digests of all leaves are known."""
        if self._digests is not None:
            self._digests.append(digests)

    def fingerprint(self, nbytes: int) -> str | None:
        """Of all of them, or None if it isn't wanted."""
        return None if self._digests is None else root(b"".join(self._digests), nbytes)


def rooms_of(chunk: ChunkEntry) -> int:
    """How many rooms a chunk wants, for planes or for all bytes: what it is decoded to."""
    count = len(chunk.planes)
    return count if count > 1 and chunk.is_plain else 1


def read_chunks(every: Sequence[Wanted], slot: Slot, arena: Arena) -> list[str | None]:
    """Read chunks and decode them into their rooms; the fingerprints that are wanted.

    They aren't compared yet.  Uses the slot's `coded` and, if planes are to be
    joined into one room, `planes`.

    Raises:
        CorruptError: names tensor, file and offset.
        AuthenticationError: the bytes aren't those that were sealed; so does it.
    """
    found: list[str | None] = []
    for run in _runs(every):
        first = run[0]
        if first.chunk.sources:
            found.append(_make_derived(first, arena))
            continue
        with open_segment(first.job.store, first.chunk.extent.segment) as reader:
            reader.expect([one.chunk.extent for one in run])
            for is_small, some in groupby(run, _is_small):
                if is_small:
                    found += _read_small(list(some), reader)
                else:
                    found += [_read_one(one, reader, slot, arena) for one in some]
    return found


def check_chunk(job: Job, chunk: ChunkEntry, slot: Slot, arena: Arena) -> Bytes:
    """Read, decode and check one chunk; its raw bytes lie in the slot.

    Raises:
        CorruptError: names tensor, file and offset.
    """
    room = slot.raw[: chunk.nbytes]
    compare(job, chunk, read_chunks([Wanted(job, chunk, [room])], slot, arena))
    return room


def compare(
    job: Job, chunk: ChunkEntry, fingerprints: Sequence[str | None], expected: str | None = None
) -> None:
    """See that what a chunk was decoded to, in each place, is what was saved.

    Of less than the whole chunk, that it is what is `expected` there.

    Raises:
        CorruptError: it isn't.
    """
    if any(found != (expected or chunk.fingerprint) for found in fingerprints):
        raise CorruptError(
            where_of(job, chunk), "the fingerprint of the decoded bytes isn't the manifest's"
        )


def where_of(job: Job, chunk: ChunkEntry) -> str:
    """A chunk's tensor, file and offset, for errors."""
    return f"{job.entry.spec.label} in {job.store.root}/{chunk.extent}"


def derived_name(spec: Spec) -> str:
    """What a tensor is called, for errors, while others are read that it is the rounding of."""
    return f"{spec.name} (derived from {MASTER} numbers)"


def _runs(every: Sequence[Wanted]) -> Iterator[list[Wanted]]:
    """Chunks one after the other that lie in one file; one that is derived is alone."""
    run: list[Wanted] = []
    for one in every:
        if run and not _goes_on(run[-1], one):
            yield run
            run = []
        run.append(one)
    if run:
        yield run


def _goes_on(before: Wanted, after: Wanted) -> bool:
    return (
        not before.chunk.sources
        and not after.chunk.sources
        and before.job.store is after.job.store
        and before.chunk.extent.segment == after.chunk.extent.segment
    )


def _is_small(one: Wanted) -> bool:
    """Whether a chunk is one leaf, as it is: many of these are read and looked at together."""
    chunk = one.chunk
    if (
        chunk.nbytes > LEAF_NBYTES
        or len(chunk.planes) != 1
        or chunk.base
        or chunk.digest
        or chunk.tiles
    ):
        return False
    return chunk.planes[0].codec == "raw"


def _read_small(every: Sequence[Wanted], reader: Reader) -> Iterator[str | None]:
    together = max(PART_NBYTES // max(one.chunk.nbytes for one in every), 1)  # while in a cache
    for at in range(0, len(every), together):
        some = every[at : at + together]
        rooms = [one.rooms[0] for one in some]
        reader.read_small([one.chunk.extent for one in some], rooms)
        checks = checks_of([room.data for room in rooms])
        for one, (printed, check) in zip(some, checks, strict=True):
            if check != one.chunk.checksum:
                raise _changed_on_disk(one.job, one.chunk)
            yield printed if one.looked_at else None


def _read_one(one: Wanted, reader: Reader, slot: Slot, arena: Arena) -> str | None:
    job, chunk, rooms = one.job, one.chunk, one.rooms
    leaves = _Leaves(wanted=one.looked_at)
    if chunk.tiles:
        coded = _encoded(job, chunk, reader, slot.coded)
        with arena.spare() as spare:
            decode_tiles(coded, chunk, (slot, spare), rooms, where_of(job, chunk))
        if len(rooms) == 1:
            leaves.note(rooms[0].data)
    elif [plane.codec for plane in chunk.planes] == ["raw"] and chunk.base is None:
        digests = _read_seen(job, chunk, reader, rooms[0])
        if digests is None:
            _check_encoded(job, chunk, _noted(reader.read(chunk.extent, rooms[0]), leaves.note))
        else:
            leaves.take(digests)
    elif chunk.is_plain:
        coded = _encoded(job, chunk, reader, slot.coded)
        where, turned = where_of(job, chunk), chunk.turned
        decode(coded, chunk.planes, slot, rooms, where, turned=turned, note=leaves.note)
    else:
        _read_links(job, chunk, rooms[0], reader, arena)
        leaves.note(rooms[0].data)
    return leaves.fingerprint(chunk.nbytes)


def _make_derived(one: Wanted, arena: Arena) -> str | None:
    """Read the chunks that one is the rounding of, and round them, unless it is made already."""
    job, chunk, (out,) = one.job, one.chunk, one.rooms
    spec, leaves = job.entry.spec, _Leaves(wanted=one.looked_at)
    named = replace(spec, name=derived_name(spec))
    master = replace(job, entry=replace(job.entry, spec=named))
    for source in () if one.made else chunk.sources:
        with arena.spare() as spare:
            raw = spare.raw[: source.nbytes]
            read_chunks([Wanted(master, source, [raw], looked_at=False)], spare, arena)
            at = source.start // 2 - chunk.start
            round_to(spec.dtype, raw, out[at : at + source.nbytes // 2])
    leaves.note(out.data)
    return leaves.fingerprint(chunk.nbytes)


def _read_links(job: Job, chunk: ChunkEntry, out: Bytes, reader: Reader, arena: Arena) -> None:
    """Decode a chunk of which planes are packed, or its bases one after the other and then it."""
    with arena.spare() as spare:
        for link in reversed(chunk.chain):
            if link is chunk:
                coded = _encoded(job, link, reader, spare.coded)
            else:
                with open_segment(job.store, link.extent.segment) as base_reader:
                    coded = _encoded(job, link, base_reader, spare.coded)
            where, turned = where_of(job, link), link.turned
            if link.tiles:
                with arena.spare() as other:
                    decode_tiles(coded, link, (spare, other), [out], where)
            elif link.is_plain:
                decode(coded, link.planes, spare, [out], where, turned=turned)
            else:
                base = None if link.base is None else out
                decode_delta(coded, link.planes, spare, out, base=base, where=where, turned=turned)


def _encoded(job: Job, chunk: ChunkEntry, reader: Reader, room: Bytes) -> Bytes:
    """A chunk's encoded bytes but for an index of tiles, at the beginning of `room`."""
    extent, length = chunk.extent, planes_nbytes(chunk)
    coded = room[:length]
    if extent.length > room.size:  # for an index there may be no room
        parts = reader.read(replace(extent, length=length), coded)
        index = Extent(extent.segment, extent.offset + length, extent.length - length)
        more = reader.read(index, np.empty(index.length, np.uint8))
        _check_encoded(job, chunk, chain(parts, more))
    elif _read_seen(job, chunk, reader, room[: extent.length]) is None:
        _check_encoded(job, chunk, reader.read(extent, room[: extent.length]))
    return coded


def _read_seen(job: Job, chunk: ChunkEntry, reader: Reader, room: Bytes) -> bytes | None:
    """Read a chunk's encoded bytes and compare their checksum, at once; their leaves' digests.

    In parts each is two calls that let go of the interpreter's lock and wait for it: sixteen
    times two a chunk.  None: nothing was read.
    """
    seen = None if chunk.digest else reader.read_seen(chunk.extent, room)
    if seen is None:
        return None
    digests, check = seen
    if f"{check:016x}" != chunk.checksum:
        raise _changed_on_disk(job, chunk)
    return digests


def _check_encoded(job: Job, chunk: ChunkEntry, parts: Iterable[memoryview]) -> None:
    digest = hashlib.sha256() if chunk.digest else None
    if checksum(_noted(parts, digest.update) if digest else parts) != chunk.checksum:
        raise _changed_on_disk(job, chunk)
    if digest and digest.hexdigest() != chunk.digest:
        raise AuthenticationError(
            where_of(job, chunk),
            "the bytes on disk aren't those that were sealed, though their checksum fits",
            "somebody without the key has changed them: don't use them",
        )


def _changed_on_disk(job: Job, chunk: ChunkEntry) -> CorruptError:
    return CorruptError(
        where_of(job, chunk), "the checksum of the bytes on disk isn't the manifest's"
    )


def _noted(
    parts: Iterable[memoryview], note: Callable[[memoryview], object]
) -> Iterator[memoryview]:
    for part in parts:
        note(part)
        yield part
