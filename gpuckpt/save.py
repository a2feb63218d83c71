"""Save a snapshot: stage, encode, write, commit."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpuckpt import layout
from gpuckpt.coding import Choice, Encoded, choose_by_entropy, choose_nothing, encode
from gpuckpt.commit import commit
from gpuckpt.errors import InvalidError
from gpuckpt.fingerprint import checksum, fingerprint
from gpuckpt.inventory import Snapshot
from gpuckpt.manifest import Manifest, TensorEntry
from gpuckpt.ordered import ordered_map
from gpuckpt.plan import plan_chunks
from gpuckpt.resources import Resources
from gpuckpt.segments import Writer
from gpuckpt.spec import ChunkEntry, Extent, Spec
from gpuckpt.staging import Staged, stage
from gpuckpt.stats import Stats
from gpuckpt.stores import Store

CODECS: dict[str, Choice] = {
    "auto": choose_by_entropy,
    "raw": choose_nothing,
    "zstd": lambda _, width: [True] * width,
}

log = logging.getLogger("gpuckpt")


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
    """A chunk ready to be written."""

    staged: Staged
    encoded: Encoded
    fingerprint: str
    checksum: str
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
    staged = stage(snapshot, chunks, resources.devices, arena)
    work = _encoder(specs, choose, _countdown(len(chunks), snapshot.release))

    def drop(item: Staged) -> None:
        try:
            item.transfer.wait()  # else a copy could still arrive in the slot's next chunk
        except BaseException as error:
            log.debug("a chunk was dropped: %s", error)  # why it was dropped is raised elsewhere
        finally:
            arena.give(item.slot)

    for coded in ordered_map(work, staged, workers=resources.workers, drop=drop):
        try:
            begun = time.perf_counter()
            extent = writer.write(coded.encoded.parts)
            stats.write_seconds += time.perf_counter() - begun
        finally:
            arena.give(coded.staged.slot)
        rows[coded.staged.chunk.tensor].append(_entry(coded, extent))
        stats.encode_seconds += coded.seconds
        stats.cpu_seconds += coded.cpu_seconds
        stats.encoded_nbytes += extent.length
    stats.chunks = len(chunks)
    return rows


def _encoder(
    specs: Sequence[Spec], choose: Choice, staged: Callable[[], None]
) -> Callable[[Staged], _Coded]:
    """Encode one staged chunk; `staged` is called after each copy to the host."""

    def work(item: Staged) -> _Coded:
        raw = item.transfer.wait()
        staged()
        begun, cpu = time.perf_counter(), time.thread_time()
        value = fingerprint(raw.data)
        encoded = encode(raw, specs[item.chunk.tensor].width, item.slot, choose)
        check = checksum(encoded.parts)
        elapsed, used = time.perf_counter() - begun, time.thread_time() - cpu
        return _Coded(item, encoded, value, check, elapsed, used)

    return work


def _countdown(count: int, finish: Callable[[], None]) -> Callable[[], None]:
    """Call `finish` once the returned function has been called `count` times, by any threads."""
    lock, left = threading.Lock(), count

    def one_less() -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if last:
            finish()

    return one_less


def _entry(coded: _Coded, extent: Extent) -> ChunkEntry:
    chunk = coded.staged.chunk
    return ChunkEntry(
        start=chunk.start,
        nbytes=chunk.nbytes,
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
