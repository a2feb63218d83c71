"""Read everything, check everything, change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gpuckpt.apart import Apart
from gpuckpt.arena import Slot
from gpuckpt.commit import open_step
from gpuckpt.errors import CheckpointError, CorruptError
from gpuckpt.manifest import Manifest
from gpuckpt.ordered import ordered_map
from gpuckpt.reading import Job, check_chunk, where_of
from gpuckpt.resources import Resources
from gpuckpt.restore import largest_chunk
from gpuckpt.seal import Seal
from gpuckpt.segments import read_index
from gpuckpt.spec import ChunkEntry
from gpuckpt.stores import Store
from gpuckpt.tilereading import check_index


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes that aren't what was written: in which tensor, which file and where in it."""

    tensor: str
    file: str
    offset: int
    reason: str


@dataclass(frozen=True, slots=True)
class _Piece:
    job: Job
    chunk: ChunkEntry
    slot: Slot


def verify_step(
    store: Store,
    step: int,
    resources: Resources,
    progress: Callable[[int], None] = lambda _: None,
    seal: Seal | None = None,
) -> list[Damage]:
    """Check every byte of a committed step: manifest, chunks, tiles, and each segment's own index.

    With a `seal`, what isn't sealed with its key is damage.
    `progress` is told of encoded bytes as they are done.
    """
    try:
        manifest = open_step(store, step, seal)
    except CheckpointError as error:
        return [Damage("", f"the manifest of step {step}", 0, str(error))]
    damage = verify_chunks(store, manifest, resources, progress)
    reason = "it isn't here: in the root of another machine, or lost"
    damage += [Damage("", name, 0, reason) for name in manifest.absent]
    for name in manifest.segments:
        try:
            read_index(store, name, seal)
        except CheckpointError as error:
            damage.append(Damage("", name, 0, str(error)))
    return damage


def verify_chunks(
    store: Store,
    manifest: Manifest,
    resources: Resources,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Damage]:
    """Check every chunk that a manifest lists, committed or not; progress as `verify_step`."""
    return Apart(lambda: list(_verify_chunks(store, manifest, resources, progress))).run()


def _verify_chunks(
    store: Store, manifest: Manifest, resources: Resources, progress: Callable[[int], None]
) -> Iterator[Damage]:
    arena = resources.arena(["cpu"], largest_chunk(manifest.tensors))

    def pieces() -> Iterator[_Piece]:
        for entry in manifest.tensors:
            job = Job(store, entry, ())
            for chunk in entry.chunks:
                yield _Piece(job, chunk, arena.take())

    def work(piece: _Piece) -> tuple[_Piece, str]:
        try:
            check_chunk(piece.job, piece.chunk, piece.slot, arena)
            check_index(piece.job, piece.chunk, piece.slot)
        except CorruptError as error:
            own = error.where == where_of(piece.job, piece.chunk)
            return piece, error.reason if own else str(error)
        except CheckpointError as error:
            return piece, str(error)
        return piece, ""

    def drop(piece: _Piece) -> None:
        arena.give(piece.slot)

    for piece, reason in ordered_map(work, pieces(), workers=resources.workers, drop=drop):
        arena.give(piece.slot)
        extent = piece.chunk.extent
        progress(extent.length)
        if reason:
            yield Damage(piece.job.entry.spec.label, extent.segment, extent.offset, reason)
