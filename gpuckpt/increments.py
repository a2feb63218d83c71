"""What of a state the checkpoint before holds already, so that it needn't be written again."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence

from gpuckpt.entries import CHAIN_MAX
from gpuckpt.errors import CheckpointError
from gpuckpt.manifest import Manifest
from gpuckpt.segments import data_nbytes
from gpuckpt.spec import Chunk, ChunkEntry, Spec
from gpuckpt.stores import Store
from gpuckpt.tensors import TensorEntry

# A segment less of which was in use by the checkpoint before isn't referred to any more, so
# that it can go: else a few chunks each would keep ever more segments on the disk.
LEAST_LIVE = 0.5


# What must be read for a chunk with all its bases, as a share of its raw bytes: room for two
# deltas of float32 with Adam, that take two thirds of it each (ADR 0030).
CHAIN_SHARE = 2.5


class Before:
    """The chunks of the checkpoint before to which the next one may refer."""

    def __init__(self, chunks: Sequence[dict[int, ChunkEntry]], full_every: int) -> None:
        """By position of the tensor in the new state, then by the byte at which they start."""
        self._chunks, self._full_every = chunks, full_every

    @classmethod
    def of(
        cls, previous: Manifest | None, specs: Sequence[Spec], store: Store, full_every: int
    ) -> Before:
        """Those of `previous`, which must be committed in `store`, for tensors of the same name.

        Without those of segments that are gone or mostly out of use.  None at
        all if every checkpoint is to be full.
        """
        if previous is None or full_every == 1:
            return cls([{} for _ in specs], full_every)
        usable = _usable(previous, store)
        entries = {entry.spec.label: entry for entry in previous.tensors}
        chunks = [_chunks(entries.get(spec.label), spec, usable) for spec in specs]
        return cls(chunks, full_every)

    @property
    def is_empty(self) -> bool:
        """Whether there are none."""
        return not any(self._chunks)

    def has(self, chunk: Chunk) -> bool:
        """Whether there is an entry that a chunk may turn out to be, unchanged."""
        entry = self._chunks[chunk.tensor].get(chunk.start)
        return entry is not None and entry.nbytes == chunk.nbytes

    def same(self, chunk: Chunk, fingerprint: str) -> ChunkEntry | None:
        """The entry of a chunk that has not changed."""
        entry = self._chunks[chunk.tensor].get(chunk.start)
        if entry is None or entry.nbytes != chunk.nbytes or entry.fingerprint != fingerprint:
            return None
        return entry

    def base(self, chunk: Chunk) -> ChunkEntry | None:
        """The entry of a chunk from which one that has changed may be a delta."""
        entry = self._chunks[chunk.tensor].get(chunk.start)
        if entry is None or entry.nbytes != chunk.nbytes or entry.sources:
            return None
        return entry if len(entry.chain) < min(self._full_every, CHAIN_MAX) else None


def is_short(base: ChunkEntry, share: float) -> bool:
    """Whether a delta, of such a share of the raw bytes, leaves the chain quick to read."""
    nbytes = sum(link.extent.length for link in base.chain) + share * base.nbytes
    return nbytes <= CHAIN_SHARE * base.nbytes


def _chunks(entry: TensorEntry | None, spec: Spec, usable: frozenset[str]) -> dict[int, ChunkEntry]:
    if entry is None or entry.spec.dtype != spec.dtype:
        return {}
    return {
        chunk.start: chunk
        for chunk in entry.chunks
        if all(link.extent.segment in usable for link in chunk.links)
    }


def _usable(previous: Manifest, store: Store) -> frozenset[str]:
    """The segments that are there, and of which enough is in use."""
    live: Counter[str] = Counter()
    links = (link for entry in previous.tensors for chunk in entry.chunks for link in chunk.links)
    for extent in dict.fromkeys(link.extent for link in links):
        live[extent.segment] += extent.length
    found = set()
    for name, nbytes in live.items():
        with contextlib.suppress(CheckpointError):
            if nbytes >= LEAST_LIVE * data_nbytes(store, name):
                found.add(name)
    return frozenset(found)
