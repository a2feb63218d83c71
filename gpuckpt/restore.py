"""Restore tensors: read, decode, check, upload."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from gpuckpt.apart import Apart, Flag
from gpuckpt.arena import Arena, Slot
from gpuckpt.arrays import Tensor
from gpuckpt.devices import Device, Devices, Piece, Transfer
from gpuckpt.errors import MismatchError
from gpuckpt.filled import Filled
from gpuckpt.ordered import alternated, ordered_map
from gpuckpt.plan import (
    Plan,
    batch_chunks,
    is_dense,
    staged_nbytes,
    target_nbytes,
)
from gpuckpt.reading import Job, Wanted, compare, read_chunks, rooms_of
from gpuckpt.resources import Resources
from gpuckpt.spec import Chunk, ChunkEntry
from gpuckpt.staging import upload
from gpuckpt.tensors import TensorEntry

log = logging.getLogger("gpuckpt")

Progress = Callable[[int], None]

# Small chunks that one worker takes at a time: each is a read, and reads may be slow.
READS_TOGETHER = 32


@dataclass(slots=True)
class _Batch:
    """Some chunks of some jobs, all for one device, a slot to work in, and what has been begun."""

    device: str
    chunks: tuple[tuple[Job, ChunkEntry], ...]
    slot: Slot
    transfer: Transfer[Sequence[Sequence[str]]] | None = None

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
            been filled in part, with these bytes too.
    """
    names = {target.spec.device for job in jobs for target in job.targets}
    arena = resources.arena(names, largest_chunk(job.entry for job in jobs))
    shares = _by_device(jobs, arena)
    stopped = Flag()
    apart = Apart(lambda: _restore_all(shares, resources, arena, progress, stopped))
    for name in names:
        resources.devices[name].begin_uploads(arena.chunk_nbytes)
    try:
        apart.run(stopped.set)
    finally:
        for name in names:
            resources.devices[name].finish_uploads()


def _by_device(jobs: Sequence[Job], arena: Arena) -> dict[str, list[Job]]:
    """The jobs, each with targets on one device, and no more of them than a slot has room for."""
    shares: dict[str, list[Job]] = {}
    for job in jobs:
        most = max(arena.area_nbytes // target_nbytes(largest_chunk([job.entry])), 1)
        for device in dict.fromkeys(target.spec.device for target in job.targets):
            targets = tuple(one for one in job.targets if one.spec.device == device)
            shares.setdefault(device, []).extend(
                replace(job, targets=targets[at : at + most]) for at in range(0, len(targets), most)
            )
    return shares


def _restore_all(
    shares: Mapping[str, Sequence[Job]],
    resources: Resources,
    arena: Arena,
    progress: Progress,
    stopped: Flag,
) -> None:
    """Every chunk of every job, until it is `stopped`."""
    overlaps = overlapping([job for share in shares.values() for job in share])
    shared = frozenset(id(job) for job, _ in overlaps)
    filled = Filled()

    def work(batch: _Batch) -> _Batch:
        if not stopped.is_set():
            device = resources.devices[batch.device]
            batch.transfer = _begin(batch, device, arena, shared, filled)
        return batch

    drop = partial(_drop, arena=arena)
    batches = _batches(shares, arena)
    for batch in ordered_map(work, batches, workers=resources.workers, drop=drop):
        try:
            if batch.transfer is not None:
                _check(batch, batch.transfer.wait())
                _take_note(batch, shared, filled)
        finally:
            arena.give(batch.slot)
        progress(batch.nbytes)
        if stopped.is_set():
            return
    for job, target in overlaps:
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
    spec, chunks = target.spec, job.entry.chunks
    rereads = tuple((Chunk(0, chunk.start, chunk.nbytes),) for chunk in chunks)
    strided = frozenset(() if is_dense(spec, target.strides) else (0,))
    plan = Plan(
        *(spec.device, [spec], [target.strides], (0,), (), rereads, strided),
        split=False,
        chunk_nbytes=arena.chunk_nbytes,
    )
    addresses = np.array([target.address], np.uint64)
    frozen = devices[spec.device].freeze(plan, addresses, [target.owner], copy=False)
    slot = arena.take()
    try:
        for at, chunk in enumerate(chunks):
            if frozen.reread(at, slot).wait() != [chunk.fingerprint]:
                raise MismatchError(
                    f"{spec.name} shares memory with another array of the state, and the "
                    "checkpoint has other bytes for each; the state has been filled with a mixture",
                    hint="give them memory of their own, or restore one of them by names=",
                )
    finally:
        frozen.release()
        arena.give(slot)


def largest_chunk(entries: Iterable[TensorEntry]) -> int:
    """Raw bytes of the largest chunk, for which a slot must have room."""
    chunks = [chunk for entry in entries for chunk in entry.chunks]
    return max((one.nbytes for chunk in chunks for one in (chunk, *chunk.sources)), default=0)


def _batches(shares: Mapping[str, Sequence[Job]], arena: Arena) -> Iterator[_Batch]:
    """Chunks in the order of the jobs, small ones together, the devices in turn."""
    return alternated(_share_batches(device, jobs, arena) for device, jobs in shares.items())


def _share_batches(device: str, jobs: Sequence[Job], arena: Arena) -> Iterator[_Batch]:
    every = [(job, chunk) for job in jobs for chunk in job.entry.chunks]
    every.sort(key=lambda pair: bool(pair[1].sources))  # by then their masters may be here

    def cost(chunk: Chunk) -> int:
        job, entry = every[chunk.tensor]
        staged = staged_nbytes(chunk.nbytes, rooms_of(entry), strided=True)
        return max(staged, target_nbytes(chunk.nbytes) * len(job.targets))

    chunks = (Chunk(at, 0, chunk.nbytes) for at, (_, chunk) in enumerate(every))
    room = arena.area_nbytes
    for batch in batch_chunks(chunks, cost, batch_nbytes=room, most=READS_TOGETHER):
        yield _Batch(device, tuple(every[chunk.tensor] for chunk in batch), arena.take())


def _begin(
    batch: _Batch, device: Device, arena: Arena, shared: frozenset[int], filled: Filled
) -> Transfer[Sequence[Sequence[str]]]:
    """Read and decode a batch's chunks, and begin to upload them.

    `shared` are the jobs, by identity, whose targets share memory with others.
    """
    pieces = [
        Piece(
            *(chunk.nbytes, rooms_of(chunk), chunk.start, job.targets, id(job) in shared),
            turned=chunk.turned and rooms_of(chunk) > 1,
        )
        for job, chunk in batch.chunks
    ]
    uploading = upload(pieces, device, batch.slot)
    wanted = [
        Wanted(
            *(job, chunk, rooms, uploading.wants_fingerprints),
            made=filled.round(job.entry.spec.dtype, chunk, rooms[0]),
        )
        for (job, chunk), rooms in zip(batch.chunks, uploading.rooms, strict=True)
    ]
    return uploading.start(read_chunks(wanted, batch.slot, arena))


def _drop(batch: _Batch, arena: Arena) -> None:
    """Give a slot back whose result nobody wants, once nothing reads it any more."""
    try:
        if batch.transfer is not None:
            batch.transfer.wait()
    except BaseException as error:
        log.debug("chunks were dropped: %s", error)  # why they were is raised elsewhere
    finally:
        arena.give(batch.slot)


def _take_note(batch: _Batch, shared: frozenset[int], filled: Filled) -> None:
    """What others may be put over isn't relied on."""
    for job, chunk in batch.chunks:
        if id(job) not in shared:
            filled.add(job.targets, chunk)


def _check(batch: _Batch, found: Sequence[Sequence[str]]) -> None:
    for (job, chunk), fingerprints in zip(batch.chunks, found, strict=True):
        compare(job, chunk, fingerprints)
