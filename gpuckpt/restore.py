"""Restore tensors: read, decode, check, upload."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpuckpt.apart import Apart, Flag
from gpuckpt.arena import Arena, Slot
from gpuckpt.arrays import Tensor
from gpuckpt.coding import decode
from gpuckpt.devices import Devices
from gpuckpt.errors import CorruptError, MismatchError
from gpuckpt.fingerprint import checksum, fingerprint
from gpuckpt.manifest import TensorEntry
from gpuckpt.ordered import ordered_map
from gpuckpt.plan import batch_chunks
from gpuckpt.resources import Resources
from gpuckpt.segments import read
from gpuckpt.spec import Chunk, ChunkEntry
from gpuckpt.staging import room_in, upload
from gpuckpt.stores import Store

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int], None]

# Small chunks that one worker takes at a time: each is a read, and reads may be slow.
READS_TOGETHER = 32


@dataclass(frozen=True, slots=True)
class Job:
    """A tensor of a checkpoint, and the tensors to fill with its bytes (at least one)."""

    store: Store
    entry: TensorEntry
    targets: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class _Batch:
    """Some chunks of some jobs, and a slot to work in, for one after the other."""

    chunks: tuple[tuple[Job, ChunkEntry], ...]
    slot: Slot

    @property
    def nbytes(self) -> int:
        """Raw bytes of its chunks."""
        return sum(chunk.nbytes for _, chunk in self.chunks)


def restore_tensors(
    jobs: Sequence[Job], resources: Resources, progress: Progress = lambda _: None
) -> None:
    """Fill every job's targets; each byte is checked on its way.

    The caller's streams are ordered after it.  `progress` is told of raw
    bytes as they are done.

    Raises:
        CorruptError: some bytes aren't what was written.  Targets may have
            been filled in part, and hold no chunk that failed its check but
            where it was decoded in place.
    """
    names = {target.spec.device for job in jobs for target in job.targets}
    arena = resources.arena(names, largest_chunk(job.entry for job in jobs))
    for name in names:
        resources.devices[name].begin_uploads()
    stopped = Flag()
    apart = Apart(lambda: _restore_all(jobs, resources, arena, progress, stopped))
    try:
        apart.run(stopped.set)
    finally:
        for name in names:
            resources.devices[name].finish_uploads()


def _restore_all(
    jobs: Sequence[Job], resources: Resources, arena: Arena, progress: Progress, stopped: Flag
) -> None:
    """Every chunk of every job, until it is `stopped`."""

    def work(batch: _Batch) -> _Batch:
        for job, chunk in batch.chunks:
            if not stopped.is_set():
                _restore(job, chunk, batch.slot, resources.devices)
        return batch

    def drop(batch: _Batch) -> None:
        arena.give(batch.slot)

    for batch in ordered_map(work, _batches(jobs, arena), workers=resources.workers, drop=drop):
        arena.give(batch.slot)
        progress(batch.nbytes)
        if stopped.is_set():
            return
    for job, target in overlapping(jobs):
        _check_filled(job, target, resources.devices, arena)


def overlapping(jobs: Sequence[Job]) -> list[tuple[Job, Tensor]]:
    """The targets that share memory with a target of another tensor, as views of it do."""
    every = [(job, target) for job in jobs for target in job.targets if target.spec.nbytes]
    every.sort(key=lambda pair: (pair[1].spec.device, pair[1].span))
    found: dict[int, tuple[Job, Tensor]] = {}
    furthest: tuple[Job, Tensor] | None = None  # that of those before which ends last
    for pair in every:
        device, (first, last) = pair[1].spec.device, pair[1].span
        if furthest is not None and furthest[1].spec.device == device:
            end = furthest[1].span[1]
            if first < end:
                found |= {id(furthest[1]): furthest, id(pair[1]): pair}
            if last <= end:
                continue
        furthest = pair
    return list(found.values())


def _check_filled(job: Job, target: Tensor, devices: Devices, arena: Arena) -> None:
    """See that a target still has its own bytes, and not those of one that shares its memory."""
    slot = arena.take()
    try:
        for chunk in job.entry.chunks:
            device, room = devices[target.spec.device], slot.raw[: chunk.nbytes]
            raw = device.download(target.array, chunk.start, room).wait()
            if fingerprint(raw.data) != chunk.fingerprint:
                raise MismatchError(
                    f"{target.spec.name} shares memory with another array of the state, and the "
                    "checkpoint has other bytes for each; the state has been filled with a mixture",
                    hint="give them memory of their own, or restore one of them by names=",
                )
    finally:
        arena.give(slot)


def largest_chunk(entries: Iterable[TensorEntry]) -> int:
    """Raw bytes of the largest chunk, for which a slot must have room."""
    return max((chunk.nbytes for entry in entries for chunk in entry.chunks), default=0)


def check_chunk(job: Job, chunk: ChunkEntry, slot: Slot) -> Bytes:
    """Read, decode and check one chunk; its raw bytes lie in the slot.

    Raises:
        CorruptError: names tensor, file and offset.
    """
    return _read_checked(job, chunk, slot, slot.raw[: chunk.nbytes])


def _batches(jobs: Sequence[Job], arena: Arena) -> Iterator[_Batch]:
    """Chunks in the order of the jobs, small ones together."""
    every = [(job, chunk) for job in jobs for chunk in job.entry.chunks]
    chunks = (Chunk(at, 0, chunk.nbytes) for at, (_, chunk) in enumerate(every))
    for batch in batch_chunks(chunks, batch_nbytes=arena.chunk_nbytes, most=READS_TOGETHER):
        yield _Batch(tuple(every[chunk.tensor] for chunk in batch), arena.take())


def _restore(job: Job, chunk: ChunkEntry, slot: Slot, devices: Devices) -> None:
    first, *others = job.targets
    room = room_in(first.array, chunk.start, chunk.nbytes)
    raw = _read_checked(job, chunk, slot, slot.raw[: chunk.nbytes] if room is None else room)
    for target in others if room is not None else job.targets:
        upload(raw, target.array, chunk.start, devices[target.spec.device])


def _read_checked(job: Job, chunk: ChunkEntry, slot: Slot, room: Bytes) -> Bytes:
    where = f"{job.entry.spec.name} in {job.store.root}/{chunk.extent}"
    coded = slot.coded[: chunk.extent.length]
    read(job.store, chunk.extent, coded.data)
    if checksum([coded.data]) != chunk.checksum:
        raise CorruptError(where, "the checksum of the bytes on disk isn't the manifest's")
    decode(coded, chunk.planes, slot, room, where)
    if fingerprint(room.data) != chunk.fingerprint:
        raise CorruptError(where, "the fingerprint of the decoded bytes isn't the manifest's")
    return room
