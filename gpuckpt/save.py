"""Save a snapshot: stage, encode, write, commit."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from gpuckpt import layout
from gpuckpt.balance import Balance
from gpuckpt.coding import Bytes, Choice, choose_all, choose_by_entropy, choose_nothing
from gpuckpt.commit import commit
from gpuckpt.derived import Derived, pair
from gpuckpt.encoder import Again, Coded, Encoder, countdown
from gpuckpt.errors import InvalidError
from gpuckpt.increments import Before
from gpuckpt.inventory import Snapshot
from gpuckpt.manifest import Manifest
from gpuckpt.ordered import ordered_map
from gpuckpt.plan import largest_nbytes
from gpuckpt.resources import Resources
from gpuckpt.rows import CodedChunk, Fresh, Rows, digested
from gpuckpt.seal import Seal
from gpuckpt.segments import Writer
from gpuckpt.spans import Lap
from gpuckpt.spec import ChunkEntry
from gpuckpt.staging import Reread, Staged, give_back, stage
from gpuckpt.stats import Stats
from gpuckpt.stores import Store
from gpuckpt.values import Json

# By planes, and as what the state differs by from the one before.
DELTA = "delta"
# Where it costs no time.
AUTO = "auto"
RAW, ZSTD = "raw", "zstd"
CODECS: dict[str, Choice] = {
    AUTO: choose_by_entropy,
    DELTA: choose_by_entropy,
    RAW: choose_nothing,
    ZSTD: choose_all,
}


Together = Callable[[Manifest, str, Callable[[], object], Lap], Manifest]


@dataclass(frozen=True, slots=True)
class Header:
    """What a manifest says beside the tensors."""

    step: int
    epoch: int | None
    metrics: dict[str, float]
    created: float
    writer: str


def save_snapshot(
    snapshot: Snapshot,
    header: Header,
    store: Store,
    resources: Resources,
    *,
    codec: str,
    previous: Manifest | None,
    stats: Stats,
    workers: int | None = None,
    full_every: int = 1,
    segment_nbytes: int = layout.SEGMENT_NBYTES,
    check: Callable[[], object] = lambda: None,
    seal: Seal | None = None,
    rank: int = 0,
    together: Together | None = None,
) -> Manifest:
    """Write a snapshot and commit it; on return it is durable.

    Chunks that are in `previous`, which is committed, aren't written again,
    unless each is to be full.  With a `seal`, which must have sealed that one too,
    it is sealed.  `workers` threads encode, or as many as
    `resources` allow.  Releases the snapshot as soon as nothing of it
    is read any more, and in any case.  If it fails, what it wrote is deleted,
    and no checkpoint was made; so it does if `check`, which is called now and
    then until the commit, raises.  One of several ranks commits it `together`
    with the others, by the manifest of its own rows and the token of its files.
    """
    token = secrets.token_hex(4)
    writer = Writer(
        store,
        lambda part: layout.segment_name(header.step, token, rank, part),
        segment_nbytes=segment_nbytes,
    )
    stats.workers = workers or resources.workers
    try:
        before = Before.of(previous, snapshot.inventory.specs, store, full_every)
        balance = Balance(
            stats.workers, lambda: writer.waiting_nbytes, free_seconds=resources.free_seconds
        )
        known = before, previous, balance
        rows = _write_chunks(
            *(snapshot, writer, resources, codec, *known, stats), check=check, sealed=bool(seal)
        )
        tensors = rows.entries(header.step, previous)
        lap = Lap()
        writer.finish(tensors, header.step, lap, seal)
        stats.cpu_seconds += writer.cpu_seconds
        check()
        resources.free_seconds = balance.next_free_seconds(lap.seconds_of("sync"))
        manifest = Manifest(
            step=header.step,
            structure=_structure(snapshot, alone=together is None),
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
    if together is not None:
        manifest = together(manifest, token, writer.abandon, lap)
    else:
        commit(store, manifest, abandon=writer.abandon, seal=seal)
    lap.mark("manifest")
    stats.add(lap)
    return manifest


def _structure(snapshot: Snapshot, *, alone: bool) -> Json:
    inventory = snapshot.inventory
    return inventory.structure if alone else inventory.rank_structure


def choice(codec: str) -> Choice:
    """How to choose the planes to compress: the option `codec`."""
    try:
        return CODECS[codec]
    except (KeyError, TypeError):
        raise InvalidError(f"codec is one of {', '.join(CODECS)}; got {codec!r}") from None


def balanced(choose: Choice, balance: Balance) -> Choice:
    """As `choose`, but nothing while encoding makes the disk wait."""

    def choose_or_not(samples: Sequence[Bytes], nbytes: int) -> Sequence[bool]:
        return (choose_nothing if balance.encoding_costs_time else choose)(samples, nbytes)

    return choose_or_not


def _write_chunks(  # noqa: PLR0917 - all that a save has
    snapshot: Snapshot,
    writer: Writer,
    resources: Resources,
    codec: str,
    before: Before,
    previous: Manifest | None,
    balance: Balance,
    stats: Stats,
    *,
    check: Callable[[], object],
    sealed: bool,
) -> Rows:
    """Bring every chunk of a snapshot to the disk."""
    arena = resources.arena(snapshot.plans, largest_nbytes(snapshot.plans))
    stats.host_nbytes = arena.nbytes + resources.bases.nbytes
    stats.host_nbytes += sum(resources.devices[name].ahead_nbytes for name in snapshot.plans)
    stats.copy_nbytes = sum(resources.devices[name].kept_nbytes for name in snapshot.plans)
    rows = Rows(snapshot.inventory.specs)
    reads = sum(len(plan.batches) for plan in snapshot.plans.values())
    reads += sum(len(snapshot.plans[name].rereads) for name in snapshot.live)
    bases = resources.bases if codec == DELTA else None
    arrived = countdown(reads, snapshot.release)
    balance.keeps_at_most((arena.count - stats.workers) * arena.chunk_nbytes)
    choose = balanced(choice(codec), balance) if codec == AUTO else choice(codec)
    derivation = pair(snapshot.plans, snapshot.frozen, previous, arena)
    encoder = Encoder(choose, before, bases, derivation, arena, arrived)
    drop = partial(give_back, arena=arena)
    staged = stage(snapshot, arena, None if before.is_empty else encoder)

    def work(batch: Staged | Reread) -> Coded | Again:
        done = encoder.work(batch)
        if isinstance(done, Coded):
            done = with_digests(done) if sealed else done
            balance.encoded(done.lap.seconds_of("filter", "encode"), done.nbytes)
        return done

    guarded = derivation.guarded(work)
    line = ordered_map(guarded, staged, workers=stats.workers, drop=drop, ending=derivation.end)
    with contextlib.closing(line), derivation.ended():
        for done in balance.watched(line):
            stats.add(done.lap, again=True)
            stats.cpu_seconds += done.lap.cpu_seconds
            try:
                check()
                if isinstance(done, Again):
                    rows.compare(done.staged.chunks, done.fingerprints)
                    continue
                stats.brought_nbytes += done.brought_nbytes
                _write(done.chunks, writer, rows, stats)
                balance.taken(done.nbytes)
            finally:
                arena.give(done.staged.slot)
    stats.starved_seconds = balance.waited_seconds
    return rows


def with_digests(done: Coded) -> Coded:
    """The same, with the digest of each chunk that is to be written."""
    chunks = tuple(map(digested, done.chunks))
    done.lap.mark("encode")
    return replace(done, chunks=chunks)


def _write(chunks: Sequence[CodedChunk], writer: Writer, rows: Rows, stats: Stats) -> None:
    """Write those chunks that aren't on the disk yet, and take note of all."""
    lap = Lap()
    fresh = [one.coded for one in chunks if isinstance(one.coded, Fresh)]
    extents = writer.write(one.encoded.parts for one in fresh)
    nbytes = sum(extent.length for extent in extents)
    lap.mark("write", nbytes)
    stats.add(lap, again=True)
    places = iter(extents)
    entries = [rows.add(one, places) for one in chunks]
    stats.chunks += len(chunks)
    stats.encoded_nbytes += sum(entry.extent.length for entry in entries)
    stats.written_nbytes += nbytes
    stats.delta_nbytes += sum(one.base.nbytes for one in fresh if one.base is not None)
    stats.unchanged_nbytes += sum(
        one.chunk.nbytes for one in chunks if isinstance(one.coded, ChunkEntry)
    )
    stats.derived_nbytes += sum(
        one.chunk.nbytes for one in chunks if isinstance(one.coded, Derived)
    )
