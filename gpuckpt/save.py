"""Save a snapshot: stage, encode, write, commit."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from gpuckpt import layout
from gpuckpt.coding import Choice, Encoded, choose_by_entropy, choose_nothing, encode
from gpuckpt.commit import commit
from gpuckpt.errors import InvalidError
from gpuckpt.fingerprint import checksum, fingerprint
from gpuckpt.inventory import Snapshot
from gpuckpt.manifest import Manifest, TensorEntry
from gpuckpt.ordered import ordered_map
from gpuckpt.plan import batch_chunks, plan_chunks
from gpuckpt.resources import Resources
from gpuckpt.segments import Writer
from gpuckpt.spec import Chunk, ChunkEntry, Extent, Spec
from gpuckpt.staging import Bytes, Staged, StagedChunk, give_back, stage
from gpuckpt.stats import Stats
from gpuckpt.stores import Store

CODECS: dict[str, Choice] = {
    "auto": choose_by_entropy,
    "raw": choose_nothing,
    "zstd": lambda _, width: [True] * width,
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
class _CodedChunk:
    """A chunk ready to be written."""

    chunk: Chunk
    encoded: Encoded
    fingerprint: str
    checksum: str


@dataclass(frozen=True, slots=True)
class _Coded:
    """Chunks ready to be written, and what that took."""

    staged: Staged
    chunks: tuple[_CodedChunk, ...]
    seconds: float
    cpu_seconds: float


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
        tensors = _entries(snapshot.specs, rows, header.step, previous)
        begun = time.perf_counter()
        writer.finish(tensors, header.step)
        manifest = Manifest(
            step=header.step,
            structure=snapshot.structure,
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
) -> list[list[ChunkEntry]]:
    """Bring every chunk of a snapshot to the disk; its entries, by tensor."""
    specs = snapshot.specs
    chunks = list(plan_chunks(specs, chunk_nbytes=resources.chunk_nbytes))
    largest = max((chunk.nbytes for chunk in chunks), default=0)
    arena = resources.arena({spec.device for spec in specs}, largest)
    stats.host_nbytes = arena.nbytes
    rows: list[list[ChunkEntry]] = [[] for _ in specs]
    batches = batch_chunks(chunks, batch_nbytes=arena.chunk_nbytes)
    staged = stage(snapshot, batches, resources.devices, arena)
    work = _encoder(specs, choose, _countdown(len(chunks), snapshot.release))
    drop = partial(give_back, arena=arena)
    for coded in ordered_map(work, staged, workers=resources.workers, drop=drop):
        try:
            begun = time.perf_counter()
            extents = writer.write(one.encoded.parts for one in coded.chunks)
            stats.write_seconds += time.perf_counter() - begun
        finally:
            arena.give(coded.staged.slot)
        for one, extent in zip(coded.chunks, extents, strict=True):
            rows[one.chunk.tensor].append(_entry(one, extent))
            stats.encoded_nbytes += extent.length
        stats.encode_seconds += coded.seconds
        stats.cpu_seconds += coded.cpu_seconds
    stats.chunks = len(chunks)
    return rows


def _encoder(
    specs: Sequence[Spec], choose: Choice, staged: Callable[[int], None]
) -> Callable[[Staged], _Coded]:
    """Encode a batch; `staged` is told of how many chunks the copies to the host were made."""

    def one(item: StagedChunk, raw: Bytes) -> _CodedChunk:
        encoded = encode(raw, specs[item.chunk.tensor].width, item.slot, choose)
        value, check = fingerprint(raw.data), checksum(encoded.parts)
        return _CodedChunk(item.chunk, encoded, value, check)

    def work(batch: Staged) -> _Coded:
        raws = [item.transfer.wait() for item in batch.chunks]
        staged(len(raws))
        begun, cpu = time.perf_counter(), time.thread_time()
        chunks = tuple(one(item, raw) for item, raw in zip(batch.chunks, raws, strict=True))
        elapsed, used = time.perf_counter() - begun, time.thread_time() - cpu
        return _Coded(batch, chunks, elapsed, used)

    return work


def _countdown(count: int, finish: Callable[[], None]) -> Callable[[int], None]:
    """Call `finish` once the returned function was told of `count` in all, by any threads."""
    lock, left = threading.Lock(), count

    def fewer(done: int) -> None:
        nonlocal left
        with lock:
            left -= done
            last = left == 0
        if last:
            finish()

    return fewer


def _entry(coded: _CodedChunk, extent: Extent) -> ChunkEntry:
    return ChunkEntry(
        start=coded.chunk.start,
        nbytes=coded.chunk.nbytes,
        extent=extent,
        fingerprint=coded.fingerprint,
        checksum=coded.checksum,
        planes=coded.encoded.planes,
    )


def _entries(
    specs: Sequence[Spec],
    rows: Sequence[Sequence[ChunkEntry]],
    step: int,
    previous: Manifest | None,
) -> tuple[TensorEntry, ...]:
    """The manifest's rows, each with the step at which its tensor's bytes last changed."""
    before = {entry.spec.name: entry for entry in previous.tensors} if previous else {}
    entries = []
    for spec, chunks in zip(specs, rows, strict=True):
        entry = TensorEntry(spec, tuple(chunks), step)
        old = before.get(spec.name)
        if old is not None and same_bytes(old, entry):
            entry = TensorEntry(spec, tuple(chunks), min(old.version, step))
        entries.append(entry)
    return tuple(entries)


def same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two entries' fingerprints say that they hold the same elements."""
    return (one.spec.dtype, one.spec.shape) == (other.spec.dtype, other.spec.shape) and [
        (c.start, c.nbytes, c.fingerprint) for c in one.chunks
    ] == [(c.start, c.nbytes, c.fingerprint) for c in other.chunks]
