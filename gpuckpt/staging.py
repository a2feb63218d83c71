"""Stage a snapshot's chunks into host memory, and upload chunks from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuckpt.arena import Arena, Slot
from gpuckpt.devices import Device, Devices, Transfer
from gpuckpt.inventory import Snapshot
from gpuckpt.spec import Chunk

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Staged:
    """A chunk whose copy to the host has begun: wait for `transfer`, then `give` the slot back."""

    chunk: Chunk
    slot: Slot
    transfer: Transfer


def stage(
    snapshot: Snapshot, chunks: Iterable[Chunk], devices: Devices, arena: Arena
) -> Iterator[Staged]:
    """Begin to copy each chunk of a snapshot to a slot of the arena, in order.

    Waits for a free slot, never for a copy, but first for the snapshot's own.
    """
    try:
        snapshot.settle()
        for chunk in chunks:
            slot = arena.take()
            try:
                device = devices[snapshot.specs[chunk.tensor].device]
                raw = slot.raw[: chunk.nbytes]
                assert raw.size == chunk.nbytes, (raw.size, chunk)
                transfer = device.download(snapshot.sources[chunk.tensor], chunk.start, raw)
            except BaseException:
                arena.give(slot)
                raise
            yield Staged(chunk, slot, transfer)
    finally:
        snapshot.end_downloads()


def room_in(array: Any, start: int, nbytes: int) -> Bytes | None:
    """The bytes of a chunk's place in `array`, if it is plain host memory; else None."""
    if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
        return None
    flat: Bytes = array.reshape(-1).view(np.uint8)
    return flat[start : start + nbytes]


def upload(data: Bytes, array: Any, start: int, device: Device) -> None:
    """Copy a chunk's bytes to their place in `array`, and wait until they are there."""
    device.upload(data, array, start).wait()
