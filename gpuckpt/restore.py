"""Restore tensors: read, decode, check, upload."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import numpy as np

from gpuckpt.apart import Apart, Flag
from gpuckpt.arena import Arena, Slot
from gpuckpt.arrays import Tensor
from gpuckpt.devices import Device, Devices, Piece, Transfer
from gpuckpt.dtypes import to_numpy
from gpuckpt.errors import CorruptError, MismatchError
from gpuckpt.filled import Filled
from gpuckpt.fingerprint import fingerprint
from gpuckpt.ordered import alternated, ordered_map
from gpuckpt.overlaps import overlapping
from gpuckpt.plan import (
    Plan,
    batch_chunks,
    is_dense,
    staged_nbytes,
    target_nbytes,
)
from gpuckpt.portions import Portion, Task, tasks_of
from gpuckpt.reading import Bytes, Job, Wanted, compare, read_chunks, rooms_of
from gpuckpt.resources import Resources
from gpuckpt.runs import pick
from gpuckpt.spec import Chunk, Extent
from gpuckpt.staging import upload
from gpuckpt.tensors import TensorEntry
from gpuckpt.tilereading import read_tiles

log = logging.getLogger("gpuckpt")

Progress = Callable[[int], None]

# Small chunks that one worker takes at a time: each is a read, and reads may be slow.
READS_TOGETHER = 128


@dataclass(slots=True)
class _Batch:
    """Some chunks of some jobs, all for one device, a slot to work in, and what has been begun.

    `prints` are the fingerprints that all portions of all tasks must have.
    """

    device: str
    tasks: tuple[Task, ...]
    slot: Slot
    transfer: Transfer[Sequence[Sequence[str]]] | None = None
    prints: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Raw bytes that are put into places."""
        return sum(portion.nbytes for task in self.tasks for portion in task.portions)

    @property
    def portions(self) -> Iterator[tuple[Task, Portion]]:
        """Those of all tasks, in order."""
        return ((task, portion) for task in self.tasks for portion in task.portions)


@dataclass(frozen=True, slots=True)
class _Shared:
    """What must still be in a target that shares memory with others, once all is done."""

    target: Tensor
    start: int
    nbytes: int
    fingerprint: str


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
        if len(job.targets) == 1:  # mostly
            shares.setdefault(job.targets[0].spec.device, []).append(job)
            continue
        most = max(arena.area_nbytes // target_nbytes(largest_chunk([job.entry])), 1)
        devices = dict.fromkeys(target.spec.device for target in job.targets)
        if len(devices) == 1 and len(job.targets) <= most:
            shares.setdefault(next(iter(devices)), []).append(job)
            continue
        for device in devices:
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
    shared = overlapping([job for share in shares.values() for job in share])
    masters = {extent for every in shares.values() for job in every for extent in _masters(job)}
    filled, places = Filled(masters), list[_Shared]()

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
                places += _take_note(batch, shared, filled)
        finally:
            arena.give(batch.slot)
        progress(batch.nbytes)
        if stopped.is_set():
            return
    targets: dict[int, list[_Shared]] = {}
    for place in places:
        targets.setdefault(id(place.target), []).append(place)
    for every in targets.values():
        _check_filled(every, resources.devices, arena)


def _masters(job: Job) -> Iterator[Extent]:
    """Where chunks lie of which this one's are the roundings."""
    return (source.extent for chunk in job.entry.chunks for source in chunk.sources)


def _check_filled(places: Sequence[_Shared], devices: Devices, arena: Arena) -> None:
    """See that a target still has its own bytes, and not those of one that shares its memory."""
    target = places[0].target
    spec = target.spec
    rereads = tuple((Chunk(0, place.start, place.nbytes),) for place in places)
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
        for at, place in enumerate(places):
            if frozen.reread(at, slot).wait() != [place.fingerprint]:
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
    sources = [source.nbytes for chunk in chunks for source in chunk.sources]
    return max([chunk.nbytes for chunk in chunks] + sources, default=0)


def _batches(shares: Mapping[str, Sequence[Job]], arena: Arena) -> Iterator[_Batch]:
    """Chunks in the order of the jobs, small ones together, the devices in turn."""
    return alternated(_share_batches(device, jobs, arena) for device, jobs in shares.items())


def _share_batches(device: str, jobs: Sequence[Job], arena: Arena) -> Iterator[_Batch]:
    every = [one for job in jobs for task in tasks_of(job) for one in _fitting(task, arena)]
    every.sort(key=lambda task: bool(task.chunk.sources))  # by then their masters may be here
    room = arena.area_nbytes
    for batch in batch_chunks(every, _cost, batch_nbytes=room, most=READS_TOGETHER):
        yield _Batch(device, batch, arena.take())


def _cost(task: Task) -> int:
    """Room that a task takes in each area of a slot."""
    if task.direct:
        chunk = task.chunk
        return _cost_of(chunk.nbytes, rooms_of(chunk), len(task.portions[0].targets))
    staged = sum(staged_nbytes(portion.nbytes, 1, strided=True) for portion in task.portions)
    targets = sum(target_nbytes(portion.nbytes) * len(portion.targets) for portion in task.portions)
    return max(staged, targets)


@lru_cache(maxsize=1024)  # thousands of tensors have few sizes
def _cost_of(nbytes: int, rooms: int, targets: int) -> int:
    """The same of a whole chunk."""
    return max(staged_nbytes(nbytes, rooms, strided=True), target_nbytes(nbytes) * targets)


def _fitting(task: Task, arena: Arena) -> Sequence[Task]:
    """A task as it is or, if its portions are too many for a slot, as several."""
    return (task,) if len(task.portions) == 1 else tuple(_in_parts(task, arena))


def _in_parts(task: Task, arena: Arena) -> Iterator[Task]:
    portions: list[Portion] = []
    for portion in task.portions:
        if portions and _cost(replace(task, portions=(*portions, portion))) > arena.area_nbytes:
            yield replace(task, portions=tuple(portions))
            portions = []
        portions.append(portion)
    yield replace(task, portions=tuple(portions))


def _begin(
    batch: _Batch, device: Device, arena: Arena, shared: frozenset[int], filled: Filled
) -> Transfer[Sequence[Sequence[str]]]:
    """Read and decode a batch's chunks, and begin to upload them.

    `shared` are the jobs, by identity, whose targets share memory with others.
    """
    pieces = [
        _piece(task, portion, shared=id(task.job) in shared) for task, portion in batch.portions
    ]
    uploading = upload(pieces, device, batch.slot)
    rooms = iter(uploading.rooms)
    places = [[next(rooms) for _ in task.portions] for task in batch.tasks]
    whole = [
        Wanted(
            *(task.job, task.chunk, room, uploading.wants_fingerprints),
            made=_is_made(task, room[0], filled),
        )
        for task, (room, *_) in zip(batch.tasks, places, strict=True)
        if task.direct
    ]
    direct = iter(read_chunks(whole, batch.slot, arena))
    known: list[str | None] = []
    for task, room in zip(batch.tasks, places, strict=True):
        if task.direct:
            known.append(next(direct))
            batch.prints.append(task.chunk.fingerprint)
        else:
            taken = _read_some(task, [one for (one,) in room], arena, filled)
            known += taken
            batch.prints += taken
    return uploading.start(known)


def _is_made(task: Task, room: Bytes, filled: Filled) -> bool:
    """Whether a room has its chunk's bytes without a read."""
    sources = task.chunk.sources
    return bool(sources) and filled.round(task.job.entry.spec.dtype, task.chunk, room)


def _piece(task: Task, portion: Portion, *, shared: bool) -> Piece:
    rooms = rooms_of(task.chunk) if task.direct else 1
    return Piece(
        *(portion.nbytes, rooms, portion.start, portion.targets, shared),
        turned=task.chunk.turned and rooms > 1,
    )


def _read_some(task: Task, rooms: Sequence[Bytes], arena: Arena, filled: Filled) -> list[str]:
    """Read a chunk apart, or some tiles, and bring each portion to its room; their fingerprints."""
    job, chunk, spec = task.job, task.chunk, task.job.entry.spec
    item = to_numpy(spec.dtype).itemsize
    with arena.spare() as spare:
        # Tiles that aren't as their index says: the chunk as a whole has checks of its own.
        with contextlib.suppress(CorruptError):
            if read_tiles(job, chunk, [portion.box for portion in task.portions], rooms, spare):
                return [fingerprint(room.data) for room in rooms]
        raw = spare.raw[: chunk.nbytes]
        wanted = Wanted(job, chunk, [raw], made=_is_made(task, raw, filled))
        compare(job, chunk, read_chunks([wanted], spare, arena))
        for portion, room in zip(task.portions, rooms, strict=True):
            pick(raw, chunk.start // item, spec.shape, portion.box, room, item_nbytes=item)
    return [fingerprint(room.data) for room in rooms]


def _drop(batch: _Batch, arena: Arena) -> None:
    """Give a slot back whose result nobody wants, once nothing reads it any more."""
    try:
        if batch.transfer is not None:
            batch.transfer.wait()
    except BaseException as error:
        log.debug("chunks were dropped: %s", error)  # why they were is raised elsewhere
    finally:
        arena.give(batch.slot)


def _take_note(batch: _Batch, shared: frozenset[int], filled: Filled) -> list[_Shared]:
    """What others may be put over isn't relied on, but looked at again."""
    places: list[_Shared] = []
    if not shared and not filled.masters:  # mostly
        return places
    for (task, portion), expected in zip(batch.portions, batch.prints, strict=True):
        if id(task.job) in shared:
            places += [
                _Shared(target, portion.start, portion.nbytes, expected)
                for target in portion.targets
            ]
        elif task.direct and task.chunk.extent in filled.masters:
            filled.add(portion.targets, portion.start, task.chunk)
    return places


def _check(batch: _Batch, found: Sequence[Sequence[str]]) -> None:
    for (task, _), expected, prints in zip(batch.portions, batch.prints, found, strict=True):
        if prints != [expected]:  # mostly, there is one target
            compare(task.job, task.chunk, prints, expected)
