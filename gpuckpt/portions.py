"""Which bytes of a stored chunk belong where, if more or less than all of it is wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from gpuckpt.arrays import Tensor
from gpuckpt.boxes import Box, cover, whole_box
from gpuckpt.dtypes import to_numpy
from gpuckpt.reading import Job
from gpuckpt.record import record
from gpuckpt.runs import before
from gpuckpt.shards import Shards, is_whole
from gpuckpt.spec import ChunkEntry
from gpuckpt.stores import Store


@record(frozen=True, slots=True)
class Portion:
    """What of a chunk some targets get, which all are of one box: bytes `start` … of theirs.

    `box` is theirs, counted from the first element of the chunk's shard.
    """

    box: Box
    start: int
    nbytes: int
    targets: tuple[Tensor, ...]


@record(frozen=True, slots=True)
class Task:
    """A chunk to be read, and its portions.

    If it is `direct`, the only one is the whole chunk, as it is.
    """

    job: Job
    chunk: ChunkEntry
    portions: tuple[Portion, ...]
    direct: bool


def jobs_of(
    shards: Shards,
    store: Store,
    targets: Mapping[int, Iterable[Tensor]],
    elsewhere: Mapping[str, Store] = MappingProxyType({}),
) -> Iterator[Job]:
    """What fills each target, by the position of a row of its tensor.

    The rows' bytes are in `store`, or where `elsewhere` says by their labels.

    A target is whole or a box; of each shard stored that has some of it, that
    part of the target is filled.  Nothing is wanted twice, but where two
    targets have the same elements.
    """
    for position, every in targets.items():
        rows = [row for row in shards.rows(position) if is_whole(row)]
        wanted = tuple(every)
        if len(rows) == 1 and _has_all(rows[0].spec.box, wanted):  # mostly
            yield Job(elsewhere.get(rows[0].spec.label, store), rows[0], wanted)
            continue
        boxes = [row.spec.box for row in rows]
        found: dict[int, list[Tensor]] = {}
        for target in wanted:
            box = target.spec.box
            if len(boxes) == 1 and boxes[0] == box:  # also if there is no element
                found.setdefault(0, []).append(target)
                continue
            for at, common in cover(boxes, box):
                found.setdefault(at, []).append(_view(target, common))
        for at, views in sorted(found.items()):
            place = elsewhere.get(rows[at].spec.label, store)
            yield Job(place, rows[at], tuple(views))


def _has_all(box: Box, targets: Iterable[Tensor]) -> bool:
    """Whether all of these are of this box."""
    for target in targets:
        own = target.spec.box
        if own is not box and own != box:
            return False
    return True


def _view(target: Tensor, box: Box) -> Tensor:
    """A part of a target, over the same memory."""
    spec = target.spec
    if box == spec.box:
        return target
    part = replace(spec, shape=box.shape, offset=box.offset, whole=spec.full_shape, axes=None)
    return replace(target, spec=part, array=target.array[box.inside(spec.box).slices])


def tasks_of(job: Job) -> Iterator[Task]:
    """The chunks of a job's shard of which its targets want something."""
    own = job.entry.spec.box
    if _has_all(own, job.targets):  # mostly
        box = whole_box(own.shape)
        for chunk in job.entry.chunks:
            portion = Portion(box, chunk.start, chunk.nbytes, job.targets)
            yield Task(job, chunk, (portion,), direct=True)
        return
    groups: dict[Box, list[Tensor]] = {}
    for target in job.targets:
        groups.setdefault(target.spec.box, []).append(target)
    wanted = [(box.inside(own), tuple(targets)) for box, targets in groups.items()]
    for chunk in job.entry.chunks:
        portions = tuple(_portions(job, chunk, wanted))
        if portions:
            direct = len(portions) == 1 and portions[0].nbytes == chunk.nbytes
            yield Task(job, chunk, portions, direct)


def _portions(
    job: Job, chunk: ChunkEntry, wanted: Sequence[tuple[Box, tuple[Tensor, ...]]]
) -> Iterator[Portion]:
    shape, item = job.entry.spec.shape, to_numpy(job.entry.spec.dtype).itemsize
    first, last = chunk.start // item, (chunk.start + chunk.nbytes) // item
    for box, targets in wanted:
        start, end = before(shape, box, first), before(shape, box, last)
        if start < end:
            yield Portion(box, start * item, (end - start) * item, targets)
