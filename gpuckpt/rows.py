"""What is known of each tensor's chunks while they are written, and the manifest's rows of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from gpuckpt.coding import Encoded
from gpuckpt.derived import Derived
from gpuckpt.errors import TornError
from gpuckpt.fingerprint import checksum, digest
from gpuckpt.manifest import Manifest
from gpuckpt.record import record
from gpuckpt.spec import Chunk, ChunkEntry, Extent, Spec
from gpuckpt.statistics import Statistics
from gpuckpt.tensors import TensorEntry


@record(frozen=True, slots=True)
class Fresh:
    """A chunk's bytes, ready to be written: all of it, or what it differs from its base by."""

    encoded: Encoded
    checksum: str
    base: ChunkEntry | None = None
    digest: str = ""


@record(frozen=True, slots=True)
class CodedChunk:
    """A chunk ready to be written, or one that is on the disk already, or follows from others."""

    chunk: Chunk
    fingerprint: str
    statistics: Statistics | None
    coded: Fresh | ChunkEntry | Derived


def digested(one: CodedChunk) -> CodedChunk:
    """The same, with the digest of what is to be written."""
    if not isinstance(one.coded, Fresh):
        return one
    return replace(one, coded=replace(one.coded, digest=digest(one.coded.encoded.parts)))


class Rows:
    """What is known of each tensor's chunks while they are written."""

    def __init__(self, specs: Sequence[Spec]) -> None:
        self._specs = specs
        self._chunks: list[list[ChunkEntry]] = [[] for _ in specs]
        self._statistics: list[Statistics | None] = [None] * len(specs)

    def add(self, one: CodedChunk, extents: Iterator[Extent]) -> ChunkEntry:
        """Take note of a chunk: if it is fresh, it was written to the next of `extents`.

        If it is derived, its master's chunks come before.
        """
        at, statistics = one.chunk.tensor, one.statistics
        entry = one.coded
        if isinstance(entry, Fresh):
            entry = _entry(one, entry, next(extents))
        elif isinstance(entry, Derived):
            entry = self._derived_entry(one, entry)
        self._chunks[at].append(entry)
        if statistics is not None:
            before = self._statistics[at]
            self._statistics[at] = statistics if before is None else statistics + before
        return entry

    def compare(self, chunks: Sequence[Chunk], fingerprints: Sequence[str]) -> None:
        """See that chunks which were read again are what was written.

        Raises:
            TornError: one isn't; it names the tensor.
        """
        for chunk, found in zip(chunks, fingerprints, strict=True):
            entries, at = self._chunks[chunk.tensor], self._first_at(chunk)
            if entries[at].fingerprint != found:
                raise TornError(self._specs[chunk.tensor].label)

    def entries(self, step: int, previous: Manifest | None) -> tuple[TensorEntry, ...]:
        """The manifest's rows, each with the step at which its tensor's bytes last changed."""
        before = {entry.spec.label: entry for entry in previous.tensors} if previous else {}
        entries = []
        for at, spec in enumerate(self._specs):
            chunks, version, old = tuple(self._chunks[at]), step, before.get(spec.label)
            if old is not None and _same_bytes(old, spec, chunks):
                version = min(old.version, step)
            entries.append(TensorEntry(spec, chunks, version, self._statistics[at]))
        return tuple(entries)

    def _derived_entry(self, one: CodedChunk, derived: Derived) -> ChunkEntry:
        entries = self._chunks[derived.master]
        longest, end = entries[0].nbytes, derived.start + derived.nbytes
        sources = tuple(entries[derived.start // longest : -(-end // longest)])
        first = sources[0].extent
        return ChunkEntry(
            start=one.chunk.start,
            nbytes=one.chunk.nbytes,
            extent=Extent(first.segment, first.offset, 0),
            fingerprint=one.fingerprint,
            checksum=checksum([]),
            planes=(),
            sources=sources,
        )

    def _first_at(self, chunk: Chunk) -> int:
        """A tensor's chunks are all as long as its first, but for the last."""
        return chunk.start // self._chunks[chunk.tensor][0].nbytes


def _entry(one: CodedChunk, fresh: Fresh, extent: Extent) -> ChunkEntry:
    return ChunkEntry(
        start=one.chunk.start,
        nbytes=one.chunk.nbytes,
        extent=extent,
        fingerprint=one.fingerprint,
        checksum=fresh.checksum,
        planes=fresh.encoded.planes,
        base=fresh.base,
        turned=fresh.encoded.turned,
        digest=fresh.digest,
        tiles=fresh.encoded.tiles,
    )


def _same_bytes(old: TensorEntry, spec: Spec, chunks: Sequence[ChunkEntry]) -> bool:
    """Whether fingerprints say that a tensor holds the same elements as before."""
    if (old.spec.dtype, old.spec.shape) != (spec.dtype, spec.shape):
        return False
    if len(old.chunks) != len(chunks):
        return False
    for one, other in zip(old.chunks, chunks, strict=True):
        if one.fingerprint != other.fingerprint:  # mostly, where anything differs
            return False
        if (one.start, one.nbytes) != (other.start, other.nbytes):
            return False
    return True
