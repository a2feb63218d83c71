"""What a device is given and gives back, in tests: shares of a state, their bytes, their slots."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuckpt.arena import AREAS, Arena, Slot
from gpuckpt.arrays import Tensor, look
from gpuckpt.census import take_inventory
from gpuckpt.devices import Arrived, Device, Frozen, Piece, Transfer
from gpuckpt.fingerprint import fingerprint
from gpuckpt.plan import Plan, area_nbytes, make_plans, staged_nbytes
from gpuckpt.planes import join, split
from gpuckpt.spec import Chunk
from gpuckpt.statistics import Statistics, statistics_of

# So small that an array of `views.SHAPE` has several chunks, and they several batches.
CHUNK = 256


@dataclass(frozen=True)
class Share:
    """The arrays of one device, cut into chunks: what `freeze` wants."""

    device: Device
    plan: Plan
    addresses: npt.NDArray[np.uint64]
    owners: Sequence[object]

    @property
    def chunks(self) -> list[Chunk]:
        """Every chunk, in order."""
        return [chunk for batch in self.plan.batches for chunk in batch]

    def freeze(self, *, copy: bool) -> Frozen:
        return self.device.freeze(self.plan, self.addresses, self.owners, copy=copy)

    def new_slot(self) -> Slot:
        return new_slot(self.device, self.plan.chunk_nbytes)


def share_of(
    device: Device, arrays: Sequence[Any], *, chunk_nbytes: int = CHUNK, split: bool = True
) -> Share:
    """Arrays of one device, in their order."""
    inventory = take_inventory(list(arrays))
    assert len(inventory.specs) == len(arrays), "one of them is there twice"
    plans = make_plans(
        *(inventory.specs, inventory.roster.strides, {device.name: range(len(arrays))}),
        chunk_nbytes=chunk_nbytes,
        split=split,
    )
    return Share(device, plans[device.name], inventory.addresses, inventory.owners)


def tensor_of(array: Any) -> Tensor:
    tensor = look(array, "a")
    assert tensor is not None
    return tensor


def new_slot(device: Device, chunk_nbytes: int) -> Slot:
    """A slot of the device's own memory; what was there before means nothing.

    To give it back to CUDA waits for all streams, also for one that an update has stopped.
    """
    memory = device.host_memory(AREAS * area_nbytes(chunk_nbytes))
    memory[...] = 0x77
    return Arena(memory, chunk_nbytes).take()


def checked(plan: Plan, chunk: Chunk, arrived: Arrived) -> bytes:
    """A chunk that has arrived, in one piece; what its device says of it is true."""
    assert len(arrived.planes) in {1, plan.width(chunk)}
    raw = np.empty(chunk.nbytes, np.uint8)
    join(arrived.planes, raw, turned=len(arrived.planes) > 1 and plan.turned(chunk))
    if arrived.fingerprint is not None:
        assert arrived.fingerprint == fingerprint(raw.data)
        check_statistics(arrived.statistics, statistics_of(raw, plan.specs[chunk.tensor].dtype))
    return raw.tobytes()


def check_statistics(found: Statistics | None, expected: Statistics | None) -> None:
    if found is None or expected is None:
        assert found is expected
        return
    assert (found.nans, found.infs) == (expected.nans, expected.infs)
    # The emulation flushes denormal doubles, too, where a GPU flushes float32s alone.
    least = sys.float_info.min
    assert math.isclose(found.squares, expected.squares, rel_tol=3e-6, abs_tol=least)


def download(frozen: Frozen, share: Share, slot: Slot | None = None) -> list[bytes]:
    """The bytes of each of a share's tensors, one batch after the other."""
    plan, slot = share.plan, slot or share.new_slot()
    found = [bytearray() for _ in plan.tensors]
    for at, chunks in enumerate(plan.batches):
        arrived = frozen.download(at, slot).wait()
        for chunk, one in zip(chunks, arrived, strict=True):
            assert chunk.start == len(found[chunk.tensor])
            found[chunk.tensor] += checked(plan, chunk, one)
    return [bytes(data) for data in found]


def reread(frozen: Frozen, share: Share, slot: Slot | None = None) -> dict[Chunk, str]:
    """The fingerprint of each of a share's chunks, by looking once more."""
    slot = slot or share.new_slot()
    found: dict[Chunk, str] = {}
    for at, chunks in enumerate(share.plan.rereads):
        prints = frozen.reread(at, slot).wait()
        found |= dict(zip(chunks, prints, strict=True))
    return found


def prints_of(share: Share, arrays: Sequence[bytes]) -> dict[Chunk, str]:
    """What `reread` should give for tensors that have these bytes."""
    runs = {c: arrays[c.tensor][c.start : c.start + c.nbytes] for c in share.chunks}
    return {chunk: print_of(run) for chunk, run in runs.items()}


def print_of(data: bytes) -> str:
    return fingerprint(memoryview(data))


def begin_upload(
    device: Device, pieces: Sequence[Piece], data: Sequence[bytes], chunk_nbytes: int | None = None
) -> Transfer[Sequence[Sequence[str]]]:
    """Fill the rooms with the chunks' bytes, and start; in a slot that is as large as needed."""
    uploading = device.upload(pieces, new_slot(device, chunk_nbytes or slot_nbytes(pieces)))
    for piece, rooms, one in zip(pieces, uploading.rooms, data, strict=True):
        assert len(rooms) in {1, piece.planes}
        raw = np.frombuffer(one, np.uint8)
        turned = piece.turned and len(rooms) > 1
        planes = split(raw, len(rooms), np.empty_like(raw), turned=turned)
        for room, plane in zip(rooms, planes, strict=True):
            room[...] = plane
    return uploading.start()


def upload(
    device: Device, pieces: Sequence[Piece], data: Sequence[bytes], chunk_nbytes: int | None = None
) -> None:
    """Bring chunks to their targets; each is found there as it was."""
    device.begin_uploads(chunk_nbytes or slot_nbytes(pieces))
    found = begin_upload(device, pieces, data, chunk_nbytes).wait()
    device.finish_uploads()
    assert [set(prints) for prints in found] == [{print_of(one)} for one in data]


def slot_nbytes(pieces: Sequence[Piece]) -> int:
    """Bytes of a chunk whose slot has room for some pieces."""
    return sum(
        staged_nbytes(piece.nbytes, piece.planes, strided=True) * len(piece.targets)
        for piece in pieces
    )


class OnDevice:
    """How the tests of a device's contract move whole arrays; `device` is a fixture."""

    def put(self, array: Any) -> Any:
        """An array of this device's library with the same elements, in C order."""

    def get(self, array: Any) -> Any:
        """Its elements as a numpy array, once everything before on the caller's stream is done."""

    def clear(self, array: Any) -> None:
        """Set all elements to zero, on the caller's stream."""
        array[...] = 0
