"""What is known of each tensor's chunks while they are written, and the manifest's rows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpuckpt.coding import Encoded
from gpuckpt.errors import TornError
from gpuckpt.manifest import Manifest, TensorEntry
from gpuckpt.spec import Chunk, ChunkEntry, Extent, Spec
from gpuckpt.statistics import Statistics


@dataclass(frozen=True, slots=True)
class CodedChunk:
    """A chunk ready to be written, or the entry of one that is on the disk already."""

    chunk: Chunk
    statistics: Statistics | None
    fingerprint: str
    checksum: str
    encoded: Encoded | None
    same: ChunkEntry | None = None


class Rows:
    """What is known of each tensor's chunks while they are written."""

    def __init__(self, specs: Sequence[Spec]) -> None:
        self._specs = specs
        self._chunks: list[list[ChunkEntry]] = [[] for _ in specs]
        self._statistics: list[Statistics | None] = [None] * len(specs)

    def add(self, coded: CodedChunk, extent: Extent | None) -> None:
        """Take note of a chunk that was written; one that was there already has no new extent."""
        at, statistics = coded.chunk.tensor, coded.statistics
        self._chunks[at].append(coded.same or _entry(coded, extent))
        if statistics is not None:
            self._statistics[at] = statistics + (self._statistics[at] or Statistics())

    def compare(self, chunks: Sequence[Chunk], fingerprints: Sequence[str]) -> None:
        """See that chunks which were read again are what was written.

        Raises:
            TornError: one isn't; it names the tensor.
        """
        for chunk, found in zip(chunks, fingerprints, strict=True):
            entries, at = self._chunks[chunk.tensor], self._first_at(chunk)
            if entries[at].fingerprint != found:
                raise TornError(self._specs[chunk.tensor].name)

    def entries(self, step: int, previous: Manifest | None) -> tuple[TensorEntry, ...]:
        """The manifest's rows, each with the step at which its tensor's bytes last changed."""
        before = {entry.spec.name: entry for entry in previous.tensors} if previous else {}
        entries = []
        for at, spec in enumerate(self._specs):
            entry = TensorEntry(spec, tuple(self._chunks[at]), step, self._statistics[at])
            old = before.get(spec.name)
            if old is not None and _same_bytes(old, entry):
                entry = replace(entry, version=min(old.version, step))
            entries.append(entry)
        return tuple(entries)

    def _first_at(self, chunk: Chunk) -> int:
        """A tensor's chunks are all as long as its first, but for the last."""
        return chunk.start // self._chunks[chunk.tensor][0].nbytes


def _entry(coded: CodedChunk, extent: Extent | None) -> ChunkEntry:
    assert coded.encoded is not None, coded.chunk
    assert extent is not None, coded.chunk
    return ChunkEntry(
        start=coded.chunk.start,
        nbytes=coded.chunk.nbytes,
        extent=extent,
        fingerprint=coded.fingerprint,
        checksum=coded.checksum,
        planes=coded.encoded.planes,
    )


def _same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two entries' fingerprints say that they hold the same elements."""
    return (one.spec.dtype, one.spec.shape) == (other.spec.dtype, other.spec.shape) and [
        (c.start, c.nbytes, c.fingerprint) for c in one.chunks
    ] == [(c.start, c.nbytes, c.fingerprint) for c in other.chunks]
