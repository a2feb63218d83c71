"""Read and decode one chunk, with its bases, and check each byte on its way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gpuckpt.arena import Arena, Slot
from gpuckpt.arrays import Tensor
from gpuckpt.coding import decode
from gpuckpt.deltacoding import decode_delta
from gpuckpt.errors import CorruptError
from gpuckpt.fingerprint import checksum, fingerprint
from gpuckpt.manifest import TensorEntry
from gpuckpt.rounding import MASTER, round_to
from gpuckpt.segments import read
from gpuckpt.spec import ChunkEntry
from gpuckpt.stores import Store

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Job:
    """A tensor of a checkpoint, and the tensors to fill with its bytes."""

    store: Store
    entry: TensorEntry
    targets: tuple[Tensor, ...]


def rooms_of(chunk: ChunkEntry) -> int:
    """How many rooms `read_chunk` wants, for planes or for all bytes: what it is decoded to."""
    return len(chunk.planes) if chunk.is_plain else 1


def read_chunk(
    job: Job, chunk: ChunkEntry, slot: Slot, rooms: Sequence[Bytes], arena: Arena
) -> None:
    """Read a chunk and decode it into its rooms; the fingerprint isn't compared yet.

    Uses the slot's `coded` and, if planes are to be joined into one room, `planes`.

    Raises:
        CorruptError: names tensor, file and offset.
    """
    if [plane.codec for plane in chunk.planes] == ["raw"] and chunk.base is None:
        _read(job, chunk, rooms[0])
        return
    if chunk.is_plain:
        coded = _read(job, chunk, slot.coded[: chunk.extent.length])
        decode(coded, chunk.planes, slot, rooms, where_of(job, chunk), turned=chunk.turned)
        return
    (out,) = rooms
    if chunk.sources:
        _read_rounded(job, chunk, out, arena)
        return
    with arena.spare() as spare:
        for link in reversed(chunk.chain):
            coded = _read(job, link, spare.coded[: link.extent.length])
            where = where_of(job, link)
            if link.is_plain:
                decode(coded, link.planes, spare, [out], where, turned=link.turned)
            else:
                base = None if link.base is None else out
                turned = link.turned
                decode_delta(coded, link.planes, spare, out, base=base, where=where, turned=turned)


def _read_rounded(job: Job, chunk: ChunkEntry, out: Bytes, arena: Arena) -> None:
    """Read the chunks that a derived one is the rounding of, and round them."""
    spec = job.entry.spec
    named = replace(spec, name=f"{spec.name} (derived from {MASTER} numbers)")
    master = replace(job, entry=replace(job.entry, spec=named))
    for source in chunk.sources:
        with arena.spare() as spare:
            raw = spare.raw[: source.nbytes]
            read_chunk(master, source, spare, [raw], arena)
            at = source.start // 2 - chunk.start
            round_to(spec.dtype, raw, out[at : at + source.nbytes // 2])


def check_chunk(job: Job, chunk: ChunkEntry, slot: Slot, arena: Arena) -> Bytes:
    """Read, decode and check one chunk; its raw bytes lie in the slot.

    Raises:
        CorruptError: names tensor, file and offset.
    """
    room = slot.raw[: chunk.nbytes]
    read_chunk(job, chunk, slot, [room], arena)
    compare(job, chunk, [fingerprint(room.data)])
    return room


def compare(job: Job, chunk: ChunkEntry, fingerprints: Sequence[str]) -> None:
    """See that what a chunk was decoded to, in each place, is what was saved.

    Raises:
        CorruptError: it isn't.
    """
    if any(found != chunk.fingerprint for found in fingerprints):
        raise CorruptError(
            where_of(job, chunk), "the fingerprint of the decoded bytes isn't the manifest's"
        )


def _read(job: Job, chunk: ChunkEntry, coded: Bytes) -> Bytes:
    """The encoded bytes of a chunk, once they are in `coded`."""
    read(job.store, chunk.extent, coded.data)
    if checksum([coded.data]) != chunk.checksum:
        raise CorruptError(
            where_of(job, chunk), "the checksum of the bytes on disk isn't the manifest's"
        )
    return coded


def where_of(job: Job, chunk: ChunkEntry) -> str:
    """A chunk's tensor, file and offset, for errors."""
    return f"{job.entry.spec.name} in {job.store.root}/{chunk.extent}"
