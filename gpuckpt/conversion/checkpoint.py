"""gpuckpt's own checkpoints: a step of a root, its manifest's file, or one data file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from gpuckpt import layout
from gpuckpt.arena import Slot
from gpuckpt.arrays import make
from gpuckpt.commit import steps, sweep, writing
from gpuckpt.conversion.port import (
    PART_NBYTES,
    PLAIN_FORMAT,
    Bytes,
    Format,
    Options,
    Outline,
    Source,
    parts_of,
)
from gpuckpt.conversion.pouring import snapshot_of
from gpuckpt.conversion.slabs import slabs
from gpuckpt.dtypes import to_numpy
from gpuckpt.errors import InvalidError, NotFoundError
from gpuckpt.options import make_header
from gpuckpt.ordered import ordered_map
from gpuckpt.portions import jobs_of
from gpuckpt.reading import Job, check_chunk
from gpuckpt.resources import Resources
from gpuckpt.restore import largest_chunk, restore_tensors
from gpuckpt.save import save_snapshot
from gpuckpt.shards import Shards
from gpuckpt.sizes import parse_nbytes
from gpuckpt.sources import Opened, open_source
from gpuckpt.spec import ChunkEntry
from gpuckpt.stats import Stats
from gpuckpt.stores import Store
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.opening import is_local, is_url, local_path, open_store, split
from gpuckpt.structure import numbered, of_rank, walk_json

# What of a tensor that lies in several shards is put together at a time.
_SLAB_NBYTES = 4 * PART_NBYTES


@contextlib.contextmanager
def open_checkpoint(at: str, options: Options) -> Iterator[Source]:
    """A step of a root, the newest unless `options` name it, or what a file of one has."""
    opened = open_source(at if options.step is None else (at, options.step), options.seal)
    yield CheckpointSource(opened, _resources(options))


def write_checkpoint(at: str, source: Source, options: Options) -> int:
    """Save what a source has as a step of a root, which may have others; its number.

    Raises:
        InvalidError: the root has this step already.
        LockedError: somebody else writes there.
    """
    outline, store = source.outline, open_store(at)
    step = options.step if options.step is not None else outline.step or 0
    header = make_header(step, outline.epoch, dict(outline.metrics))
    with _removed_if_new(store), writing(store):
        if step in steps(store) and not options.force:
            raise InvalidError(
                f"{store.root} has a step {step} already; pass another step=, or force=True "
                "(--force) to replace it"
            )
        resources = _resources(options)
        manifest = save_snapshot(
            *(snapshot_of(source, resources.chunk_nbytes), header, store, resources),
            codec=options.codec,
            previous=None,
            stats=Stats(step),
            seal=options.target_seal,
        )
        sweep(store, committed=manifest)
    return step


def lost_in_checkpoint(outline: Outline) -> Sequence[str]:
    """Text that belongs to no tensor, but for the one that safetensors' writer puts back."""
    text = [key for key, value in outline.metadata.items() if PLAIN_FORMAT.get(key) != value]
    return [f"metadata: {', '.join(text)}"] if text else []


class CheckpointSource:
    """A step that is open for reading: every byte is compared with the manifest's check values."""

    def __init__(self, opened: Opened, resources: Resources) -> None:
        """Nothing is read of the tensors yet.

        Raises:
            NotFoundError: some shards of a tensor aren't there.
        """
        self._opened, self._resources = opened, resources
        manifest = opened.manifest
        self._shards = shards = Shards(manifest)
        structure = of_rank(manifest.structure, 0) or {"dict": []}
        nodes = [node for _, node in walk_json(structure) if "tensor" in node]
        firsts = {node["tensor"]: shards.first(node["tensor"]) for node in nodes}
        self._positions = list(dict.fromkeys(firsts.values()))
        numbers = {at: number for number, at in enumerate(self._positions)}
        specs = [shards.spec(at) for at in self._positions]
        for at, spec in zip(self._positions, specs, strict=True):
            if lack := shards.lack(at, spec.box):
                raise NotFoundError(f"{spec.label}: {lack}")
        tree = numbered(structure, {at: numbers[first] for at, first in firsts.items()})
        self.outline = Outline(
            tree,
            tuple(replace(spec, rank=None) for spec in specs),
            step=manifest.step,
            epoch=manifest.epoch,
            metrics=manifest.metrics,
            left_out=_others(manifest.structure),
        ).named()

    def read(self, position: int) -> Iterator[memoryview]:
        """The bytes of a tensor, checked."""
        at = self._positions[position]
        rows = self._shards.rows(at)
        if len(rows) == 1 and rows[0].spec.offset is None:
            place = self._opened.elsewhere.get(rows[0].spec.label, self._opened.store)
            return self._chunks(Job(place, rows[0], ()))
        return self._slabs(at)

    def _chunks(self, job: Job) -> Iterator[memoryview]:
        """Those of one row, several chunks at once."""
        arena = self._resources.arena(["cpu"], largest_chunk([job.entry]))
        pieces = ((chunk, arena.take()) for chunk in job.entry.chunks)

        def work(piece: tuple[ChunkEntry, Slot]) -> tuple[Bytes, Slot]:
            chunk, slot = piece
            return check_chunk(job, chunk, slot, arena), slot

        workers = min(self._resources.workers, len(job.entry.chunks))
        line = ordered_map(
            *(work, pieces), workers=max(workers, 1), drop=lambda piece: arena.give(piece[1])
        )
        with contextlib.closing(line):
            for raw, slot in line:
                try:
                    yield from parts_of(raw, to_numpy(job.entry.spec.dtype).itemsize)
                finally:
                    arena.give(slot)

    def _slabs(self, at: int) -> Iterator[memoryview]:
        """Those of a tensor that lies in shards, put together."""
        spec = self._shards.spec(at)
        item = to_numpy(spec.dtype).itemsize
        for box in slabs(spec.shape, item, _SLAB_NBYTES):
            wanted = replace(self._shards.spec(at, box), axes=None)
            tensor = make(wanted, self._resources.devices["cpu"])
            jobs = jobs_of(self._shards, self._opened.store, {at: [tensor]}, self._opened.elsewhere)
            restore_tensors(list(jobs), self._resources)
            yield from parts_of(tensor.array.reshape(-1).view("u1"), item)


def _resources(options: Options) -> Resources:
    """Of each side half of what a conversion may take."""
    return Resources(parse_nbytes(options.memory) // 2)


def _others(structure: object) -> tuple[str, ...]:
    """What ranks but the first have of their own."""
    ranks = sorted(_ranks(structure) - {0})
    if not ranks:
        return ()
    return (f"what ranks {', '.join(map(str, ranks))} have of their own; that of rank 0 is taken",)


def _ranks(node: object) -> set[int]:
    if isinstance(node, dict):
        found = set().union(*map(_ranks, node.values()))
        return found | {rank for rank, _ in node["ranks"]} if "ranks" in node else found
    return set().union(*map(_ranks, node)) if isinstance(node, list) else set()


@contextlib.contextmanager
def _removed_if_new(store: Store) -> Iterator[None]:
    """If the block raises, no directory stays that it made."""
    path = Path(store.root)
    made = isinstance(store, LocalStore) and not path.exists()
    try:
        yield
    except BaseException:
        if made:
            (path / layout.LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _is_checkpoint(at: str) -> bool:
    if is_url(at) and not is_local(at):
        return True
    path = local_path(at) if is_url(at) else Path(at).expanduser()
    if path.is_dir():
        return any(layout.manifest_step(one.name) is not None for one in path.iterdir())
    return layout.manifest_step(path.name) is not None or layout.segment_step(path.name) is not None


def _may_be_root(at: str) -> bool:
    if not is_url(at):
        return "." not in Path(at).expanduser().absolute().name or _is_checkpoint(at)
    return "." not in split(at)[1]


CHECKPOINT = Format(
    "gpuckpt",
    recognises=_is_checkpoint,
    suits=_may_be_root,
    open=open_checkpoint,
    checks=True,
    lost=lost_in_checkpoint,
    write=write_checkpoint,
)
