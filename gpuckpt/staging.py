"""Stage a snapshot's chunks into host memory, and upload chunks from it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuckpt.arena import Arena, Slot
from gpuckpt.devices import Device, Devices, Transfer
from gpuckpt.inventory import Snapshot
from gpuckpt.plan import aligned
from gpuckpt.spec import Chunk

Bytes = npt.NDArray[np.uint8]

log = logging.getLogger("gpuckpt")


@dataclass(frozen=True, slots=True)
class StagedChunk:
    """A chunk whose copy to the host has begun: wait for `transfer`."""

    chunk: Chunk
    slot: Slot
    transfer: Transfer


@dataclass(frozen=True, slots=True)
class Staged:
    """Chunks that share a slot: `give` it back once all their transfers were waited for."""

    slot: Slot
    chunks: tuple[StagedChunk, ...]


def stage(
    snapshot: Snapshot, batches: Iterable[Sequence[Chunk]], devices: Devices, arena: Arena
) -> Iterator[Staged]:
    """Begin to copy each batch of a snapshot's chunks to a slot of the arena, in order.

    Waits for a free slot, never for a copy, but first for the snapshot's own.
    """
    try:
        snapshot.settle()
        for batch in batches:
            slot = arena.take()
            begun: list[StagedChunk] = []
            try:
                for part, chunk in zip(_parts(slot, batch), batch, strict=True):
                    begun.append(StagedChunk(chunk, part, _begin(snapshot, chunk, part, devices)))
            except BaseException:
                give_back(Staged(slot, tuple(begun)), arena)
                raise
            yield Staged(slot, tuple(begun))
    finally:
        snapshot.end_downloads()


def give_back(staged: Staged, arena: Arena) -> None:
    """Give the slot of chunks that nobody wants back, once no copy can arrive in it any more."""
    try:
        for one in staged.chunks:
            one.transfer.wait()
    except BaseException as error:
        log.debug("chunks were dropped: %s", error)  # why they were is raised elsewhere
    finally:
        arena.give(staged.slot)


def _parts(slot: Slot, batch: Sequence[Chunk]) -> Iterator[Slot]:
    offset = 0
    for chunk in batch:
        yield slot.part(offset, chunk.nbytes)
        offset += aligned(chunk.nbytes)


def _begin(snapshot: Snapshot, chunk: Chunk, part: Slot, devices: Devices) -> Transfer:
    assert part.raw.size == chunk.nbytes, (part.raw.size, chunk)
    device = devices[snapshot.specs[chunk.tensor].device]
    return device.download(snapshot.sources[chunk.tensor], chunk.start, part.raw)


def room_in(array: Any, start: int, nbytes: int) -> Bytes | None:
    """The bytes of a chunk's place in `array`, if it is plain host memory; else None."""
    if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
        return None
    flat: Bytes = array.reshape(-1).view(np.uint8)
    return flat[start : start + nbytes]


def upload(data: Bytes, array: Any, start: int, device: Device) -> None:
    """Copy a chunk's bytes to their place in `array`, and wait until they are there."""
    device.upload(data, array, start).wait()
