"""Save a snapshot: stage, encode, write, commit."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import starmap

from gpuckpt import layout
from gpuckpt.arena import Slot
from gpuckpt.coding import Choice, choose_all, choose_by_entropy, choose_nothing, encode
from gpuckpt.commit import commit
from gpuckpt.devices import Arrived
from gpuckpt.errors import InvalidError
from gpuckpt.fingerprint import checksum, fingerprint
from gpuckpt.inventory import Snapshot
from gpuckpt.manifest import Manifest
from gpuckpt.ordered import ordered_map
from gpuckpt.plan import largest_nbytes
from gpuckpt.resources import Resources
from gpuckpt.rows import CodedChunk, Rows
from gpuckpt.segments import Writer
from gpuckpt.spans import Lap
from gpuckpt.spec import Chunk, Spec
from gpuckpt.staging import Reread, Staged, give_back, stage
from gpuckpt.statistics import Statistics, statistics_of
from gpuckpt.stats import Stats
from gpuckpt.stores import Store

CODECS: dict[str, Choice] = {
    "auto": choose_by_entropy,
    "raw": choose_nothing,
    "zstd": choose_all,
}


_Known = tuple[str, Statistics | None]


@dataclass(frozen=True, slots=True)
class Header:
    """What a manifest says beside the tensors."""

    step: int
    epoch: int | None
    metrics: dict[str, float]
    created: float
    writer: str


@dataclass(frozen=True, slots=True)
class _Coded:
    """Chunks ready to be written, and what that took."""

    staged: Staged
    chunks: tuple[CodedChunk, ...]
    lap: Lap


@dataclass(frozen=True, slots=True)
class _Again:
    """Fingerprints of chunks that were read a second time."""

    staged: Reread
    fingerprints: Sequence[str]
    lap: Lap


def save_snapshot(
    snapshot: Snapshot,
    header: Header,
    store: Store,
    resources: Resources,
    *,
    codec: str,
    previous: Manifest | None,
    stats: Stats,
    segment_nbytes: int = layout.SEGMENT_NBYTES,
) -> Manifest:
    """Write a snapshot and commit it; on return it is durable.

    Releases the snapshot as soon as nothing of it is read any more, and in
    any case.  If it fails, what it wrote is deleted, and no checkpoint was made.
    """
    token = secrets.token_hex(4)
    writer = Writer(
        store,
        lambda part: layout.segment_name(header.step, token, 0, part),
        segment_nbytes=segment_nbytes,
    )
    try:
        rows = _write_chunks(snapshot, writer, resources, choice(codec), stats)
        tensors = rows.entries(header.step, previous)
        lap = Lap()
        writer.finish(tensors, header.step, lap)
        manifest = Manifest(
            step=header.step,
            structure=snapshot.inventory.structure,
            tensors=tensors,
            epoch=header.epoch,
            metrics=header.metrics,
            created=header.created,
            writer=header.writer,
        )
    except BaseException:
        writer.abandon()
        raise
    finally:
        snapshot.release()
        stats.staged_seconds = snapshot.staged_seconds
    commit(store, manifest, abandon=writer.abandon)
    lap.mark("manifest")
    stats.add(lap)
    return manifest


def choice(codec: str) -> Choice:
    """How to choose the planes to compress: the option `codec`."""
    try:
        return CODECS[codec]
    except (KeyError, TypeError):
        raise InvalidError(f"codec is one of {', '.join(CODECS)}; got {codec!r}") from None


def _write_chunks(
    snapshot: Snapshot, writer: Writer, resources: Resources, choose: Choice, stats: Stats
) -> Rows:
    """Bring every chunk of a snapshot to the disk."""
    arena = resources.arena(snapshot.plans, largest_nbytes(snapshot.plans))
    stats.host_nbytes, stats.workers = arena.nbytes, resources.workers
    stats.copy_nbytes = sum(resources.devices[name].kept_nbytes for name in snapshot.plans)
    rows = Rows(snapshot.inventory.specs)
    reads = sum(len(plan.batches) for plan in snapshot.plans.values())
    reads += sum(len(snapshot.plans[name].rereads) for name in snapshot.live)
    work = _worker(choose, _countdown(reads, snapshot.release))
    drop = partial(give_back, arena=arena)
    staged = stage(snapshot, arena)
    for done in ordered_map(work, staged, workers=resources.workers, drop=drop):
        stats.add(done.lap, again=True)
        stats.cpu_seconds += done.lap.cpu_seconds
        try:
            if isinstance(done, _Again):
                rows.compare(done.staged.chunks, done.fingerprints)
                continue
            writing = Lap()
            extents = writer.write(one.encoded.parts for one in done.chunks)
        finally:
            arena.give(done.staged.slot)
        nbytes = sum(extent.length for extent in extents)
        writing.mark("write", nbytes)
        stats.add(writing, again=True)
        for one, extent in zip(done.chunks, extents, strict=True):
            rows.add(one, extent)
        stats.chunks += len(extents)
        stats.encoded_nbytes += nbytes
        stats.written_nbytes += nbytes
    return rows


def _worker(
    choose: Choice, staged: Callable[[], None]
) -> Callable[[Staged | Reread], _Coded | _Again]:
    """Encode a batch, or read one again; `staged` is told when each has come to the host."""

    def known(arrived: Arrived, spec: Spec) -> _Known:
        if arrived.fingerprint is not None:
            return arrived.fingerprint, arrived.statistics
        (raw,) = arrived.planes
        return fingerprint(raw.data), statistics_of(raw, spec.dtype)

    def one(chunk: Chunk, arrived: Arrived, spec: Spec, part: Slot, of: _Known) -> CodedChunk:
        encoded = encode(arrived.planes, spec.width, part, choose)
        return CodedChunk(chunk, encoded, of[0], checksum(encoded.parts), of[1])

    def work(batch: Staged | Reread) -> _Coded | _Again:
        lap = Lap()
        if isinstance(batch, Reread):
            again = _Again(batch, batch.transfer.wait(), lap)
            lap.mark("reread")
            staged()
            return again
        arrived = batch.transfer.wait()
        nbytes = sum(chunk.nbytes for chunk in batch.chunks)
        lap.mark("copy", nbytes)
        staged()
        specs = [batch.plan.specs[chunk.tensor] for chunk in batch.chunks]
        every = list(map(known, arrived, specs))
        lap.mark("filter", 0 if arrived[0].fingerprint else nbytes)
        each = zip(batch.chunks, arrived, specs, batch.parts, every, strict=True)
        chunks = tuple(starmap(one, each))
        lap.mark("encode", nbytes)
        return _Coded(batch, chunks, lap)

    return work


def _countdown(count: int, finish: Callable[[], None]) -> Callable[[], None]:
    """Call `finish` once the returned function was called `count` times, by any threads."""
    lock, left = threading.Lock(), count

    def fewer() -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if last:
            finish()

    return fewer
