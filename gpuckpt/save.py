"""Save a snapshot: stage, encode, write, commit."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

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
from gpuckpt.spec import Chunk, Spec
from gpuckpt.staging import Reread, Staged, give_back, stage
from gpuckpt.statistics import statistics_of
from gpuckpt.stats import Stats
from gpuckpt.stores import Store

CODECS: dict[str, Choice] = {
    "auto": choose_by_entropy,
    "raw": choose_nothing,
    "zstd": choose_all,
}


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
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class _Again:
    """Fingerprints of chunks that were read a second time."""

    staged: Reread
    fingerprints: Sequence[str]


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
        begun = time.perf_counter()
        writer.finish(tensors, header.step)
        stats.cpu_seconds += writer.cpu_seconds
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
    stats.commit_seconds = time.perf_counter() - begun
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
    stats.host_nbytes = arena.nbytes
    stats.copy_nbytes = sum(resources.devices[name].kept_nbytes for name in snapshot.plans)
    rows = Rows(snapshot.inventory.specs)
    reads = sum(len(plan.batches) for plan in snapshot.plans.values())
    reads += sum(len(snapshot.plans[name].rereads) for name in snapshot.live)
    work = _worker(choose, _countdown(reads, snapshot.release))
    drop = partial(give_back, arena=arena)
    staged = stage(snapshot, arena)
    for done in ordered_map(work, staged, workers=resources.workers, drop=drop):
        try:
            if isinstance(done, _Again):
                rows.compare(done.staged.chunks, done.fingerprints)
                continue
            begun = time.perf_counter()
            extents = writer.write(one.encoded.parts for one in done.chunks)
            stats.write_seconds += time.perf_counter() - begun
        finally:
            arena.give(done.staged.slot)
        for one, extent in zip(done.chunks, extents, strict=True):
            rows.add(one, extent)
        stats.chunks += len(extents)
        stats.encoded_nbytes += sum(extent.length for extent in extents)
        stats.encode_seconds += done.seconds
        stats.cpu_seconds += done.cpu_seconds
    return rows


def _worker(
    choose: Choice, staged: Callable[[], None]
) -> Callable[[Staged | Reread], _Coded | _Again]:
    """Encode a batch, or read one again; `staged` is told when each has come to the host."""

    def one(chunk: Chunk, arrived: Arrived, spec: Spec, part: Slot) -> CodedChunk:
        encoded = encode(arrived.planes, spec.width, part, choose)
        known, statistics = arrived.fingerprint, arrived.statistics
        if known is None:
            (raw,) = arrived.planes
            known, statistics = fingerprint(raw.data), statistics_of(raw, spec.dtype)
        return CodedChunk(chunk, encoded, known, checksum(encoded.parts), statistics)

    def work(batch: Staged | Reread) -> _Coded | _Again:
        if isinstance(batch, Reread):
            again = _Again(batch, batch.transfer.wait())
            staged()
            return again
        every = batch.transfer.wait()
        staged()
        begun, cpu, specs = time.perf_counter(), time.thread_time(), batch.plan.specs
        chunks = tuple(
            one(chunk, arrived, specs[chunk.tensor], part)
            for chunk, arrived, part in zip(batch.chunks, every, batch.parts, strict=True)
        )
        elapsed, used = time.perf_counter() - begun, time.thread_time() - cpu
        return _Coded(batch, chunks, elapsed, used)

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
