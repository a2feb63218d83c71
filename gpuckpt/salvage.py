"""What of a step is intact, what is damaged by which bytes, and where else it could be had."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from gpuckpt.apart import Apart
from gpuckpt.arena import Arena, Slot
from gpuckpt.boxes import gap, whole_box
from gpuckpt.commit import open_step, steps
from gpuckpt.errors import CheckpointError, CorruptError, NotFoundError
from gpuckpt.manifest import Manifest
from gpuckpt.ordered import ordered_map
from gpuckpt.reading import Job, check_chunk
from gpuckpt.rebuilding import rebuilt
from gpuckpt.resources import Resources
from gpuckpt.restore import largest_chunk
from gpuckpt.seal import Seal
from gpuckpt.spec import ChunkEntry, Extent
from gpuckpt.stores import Store
from gpuckpt.tensors import TensorEntry, by_tensor

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Wound:
    """A chunk that can't be read, the bytes that are to blame (its own or a base's), and why."""

    chunk: ChunkEntry
    extent: Extent
    reason: str


@dataclass(slots=True)
class Loss:
    """A tensor that can't be read as it was.

    `older` is the newest older step that has it intact, with its row; `also`
    are other steps that need the same damaged bytes.
    """

    entry: TensorEntry
    wounds: list[Wound]
    older: tuple[int, TensorEntry] | None = None
    also: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Survey:
    """What there is of one step.

    `manifest` is its own or, if that is damaged, for the reason `unread`,
    what its data files say: some of the tensors, and no plain values.
    `recovered` are tensors of which damaged chunks were found in another
    step's files, bit for bit, with that step.  `template` is the newest older
    manifest, where its own is damaged.
    """

    manifest: Manifest
    unread: str = ""
    intact: list[TensorEntry] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    recovered: dict[str, int] = field(default_factory=dict)
    template: Manifest | None = None


def survey(
    store: Store,
    step: int,
    resources: Resources,
    progress: Progress = lambda _: None,
    seal: Seal | None = None,
) -> Survey:
    """Read all of a step, and of what is damaged look for other copies and older values.

    `progress` is told of bytes on disk as they are read.  With a `seal`, only
    what is sealed with its key counts as intact.  Changes nothing.

    Raises:
        NotFoundError: there is neither a manifest nor a data file of this step.
    """
    found = _opened(store, step, seal)
    wounded = _wounds(store, found.manifest.tensors, resources, progress)
    for entry in found.manifest.tensors:
        held = sum(chunk.nbytes for chunk in entry.chunks)
        wounds = wounded.get(entry.spec.label, [])
        if held < entry.spec.nbytes:
            wounds.append(_missing(entry, found.manifest))
        if wounds:
            found.losses.append(Loss(entry, wounds))
        else:
            found.intact.append(entry)
    found.losses += _gaps(found.manifest)
    if found.losses or found.unread:
        _Search(store, found, resources, seal).run()
    return found


def _opened(store: Store, step: int, seal: Seal | None) -> Survey:
    try:
        return Survey(open_step(store, step, seal))
    except CheckpointError as error:
        manifest, notes = rebuilt(store, step, seal)
        told = "it has no manifest; it may never have been committed"
        if not isinstance(error, NotFoundError):
            told = reason_of(error)
        return Survey(manifest, "; ".join([told, *notes]))


def reason_of(error: CheckpointError) -> str:
    """What an error says, without its remedy, which is salvaging."""
    return f"{error.where}: {error.reason}" if isinstance(error, CorruptError) else str(error)


def _gaps(manifest: Manifest) -> Iterator[Loss]:
    """What of tensors no shard has of which the files here say anything."""
    for rows in by_tensor(manifest.tensors).values():
        boxes, spec = [row.spec.box for row in rows], rows[0].spec
        while (box := gap(boxes, whole_box(spec.full_shape))) is not None:
            boxes.append(box)
            place = replace(
                spec, shape=box.shape, axes=None, offset=box.offset, whole=spec.full_shape
            )
            yield Loss(TensorEntry(place, (), 0), [])


def _missing(entry: TensorEntry, manifest: Manifest) -> Wound:
    held = sum(chunk.nbytes for chunk in entry.chunks)
    first = entry.chunks[0]
    reason = (
        f"this file has {held} of its {entry.spec.nbytes} bytes; where the others are only the "
        f"manifest of step {manifest.step} said"
    )
    return Wound(first, replace(first.extent, length=0), reason)  # none of its bytes is damaged


def _wounds(
    store: Store,
    entries: Sequence[TensorEntry],
    resources: Resources,
    progress: Progress = lambda _: None,
) -> dict[str, list[Wound]]:
    """The chunks of tensors that can't be read, by the rows' labels."""
    apart = Apart(lambda: list(_checked(store, entries, resources, progress)))
    found: dict[str, list[Wound]] = {}
    for name, wound in apart.run():
        found.setdefault(name, []).append(wound)
    return found


def _checked(
    store: Store, entries: Sequence[TensorEntry], resources: Resources, progress: Progress
) -> Iterator[tuple[str, Wound]]:
    arena = resources.arena(["cpu"], largest_chunk(entries))
    pieces = (
        (Job(store, entry, ()), chunk, arena.take()) for entry in entries for chunk in entry.chunks
    )

    def work(piece: tuple[Job, ChunkEntry, Slot]) -> tuple[Job, ChunkEntry, Slot, Wound | None]:
        job, chunk, slot = piece
        return job, chunk, slot, _wound(job, chunk, slot, arena)

    done = ordered_map(
        *(work, pieces), workers=resources.workers, drop=lambda piece: arena.give(piece[2])
    )
    for job, chunk, slot, wound in done:
        arena.give(slot)
        progress(chunk.extent.length)
        if wound is not None:
            yield job.entry.spec.label, wound


def _wound(job: Job, chunk: ChunkEntry, slot: Slot, arena: Arena) -> Wound | None:
    try:
        check_chunk(job, chunk, slot, arena)
    except CheckpointError:
        pass
    else:
        return None
    for link in reversed(chunk.links):  # bases come before what hangs on them
        try:
            check_chunk(job, link, slot, arena)
        except CheckpointError as error:
            reason = error.reason if isinstance(error, CorruptError) else str(error)
            return Wound(chunk, link.extent, reason)
    return None  # the second time it could be read


class _Search:
    """A look at every other step: the older ones first, from the newest on."""

    def __init__(
        self, store: Store, found: Survey, resources: Resources, seal: Seal | None
    ) -> None:
        self._store, self._found, self._resources, self._seal = store, found, resources, seal
        self._step = found.manifest.step

    def run(self) -> None:
        """For each loss, find other copies of its bytes, or the newest older value."""
        others = [one for one in steps(self._store) if one != self._step]
        older = sorted((one for one in others if one < self._step), reverse=True)
        for other in (*older, *(one for one in others if one > self._step)):
            with contextlib.suppress(CheckpointError):
                self._look_at(open_step(self._store, other, self._seal))

    def _look_at(self, manifest: Manifest) -> None:
        found, other = self._found, manifest.step
        if found.unread and found.template is None and other < self._step:
            found.template = manifest
            found.losses += self._unlisted(manifest)
        rows = {entry.spec.label: entry for entry in manifest.tensors}
        links = (link for row in manifest.tensors for chunk in row.chunks for link in chunk.links)
        used = {link.extent for link in links}
        for loss in tuple(found.losses):
            if any(wound.extent in used for wound in loss.wounds):
                loss.also.add(other)
            row = rows.get(loss.entry.spec.label)
            if row is not None and _like(row, loss.entry):
                self._take_from(loss, other, row)

    def _unlisted(self, older: Manifest) -> Iterator[Loss]:
        """Tensors that an older step has, and of which this step's own files say nothing."""
        known = {entry.spec.tensor for entry in self._found.manifest.tensors}
        for entry in older.tensors:
            if entry.spec.tensor not in known:
                yield Loss(entry, [])

    def _take_from(self, loss: Loss, other: int, row: TensorEntry) -> None:
        """Take chunks of the same bytes from another step's row, or note the older value."""
        mended = _mended(loss, row)
        if mended is not None and self._is_intact(mended):
            self._found.losses.remove(loss)
            self._found.intact.append(mended)
            self._found.recovered[mended.spec.label] = other
        elif loss.older is None and other < self._step and self._is_intact(row):
            loss.older = other, row

    def _is_intact(self, entry: TensorEntry) -> bool:
        return not _wounds(self._store, [entry], self._resources)


def _like(one: TensorEntry, other: TensorEntry) -> bool:
    return (one.spec.dtype, one.spec.shape) == (other.spec.dtype, other.spec.shape)


def _mended(loss: Loss, row: TensorEntry) -> TensorEntry | None:
    """A tensor with chunks of the same bytes from another row; None if that has other bytes."""
    same = {(chunk.start, chunk.nbytes, chunk.fingerprint): chunk for chunk in row.chunks}
    wounded = {id(wound.chunk): wound for wound in loss.wounds}
    held = sum(chunk.nbytes for chunk in loss.entry.chunks)
    if not wounded or held < loss.entry.spec.nbytes:
        return None
    chunks = []
    for chunk in loss.entry.chunks:
        taken: ChunkEntry | None = chunk
        if id(chunk) in wounded:
            taken = same.get((chunk.start, chunk.nbytes, chunk.fingerprint))
        if taken is None:
            return None
        chunks.append(taken)
    return replace(loss.entry, chunks=tuple(chunks))
