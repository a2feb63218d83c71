"""What of a state the checkpoint before holds already, so that it needn't be written again."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence

from gpuckpt.errors import CheckpointError
from gpuckpt.manifest import Manifest, TensorEntry
from gpuckpt.spec import Chunk, ChunkEntry, Spec
from gpuckpt.stores import Store

# A segment less of which was in use by the checkpoint before isn't referred to any more, so
# that it can go: else a few chunks each would keep ever more segments on the disk.
LEAST_LIVE = 0.5


class Before:
    """The chunks of the checkpoint before to which the next one may refer."""

    def __init__(self, chunks: Sequence[dict[int, ChunkEntry]]) -> None:
        """By position of the tensor in the new state, then by the byte at which they start."""
        self._chunks = chunks

    @classmethod
    def of(cls, previous: Manifest | None, specs: Sequence[Spec], store: Store) -> Before:
        """Those of `previous`, which must be committed in `store`, for tensors of the same name.

        Without those of segments that are gone or mostly out of use.
        """
        if previous is None:
            return cls([{} for _ in specs])
        usable = _usable(previous, store)
        entries = {entry.spec.name: entry for entry in previous.tensors}
        return cls([_chunks(entries.get(spec.name), spec, usable) for spec in specs])

    def same(self, chunk: Chunk, fingerprint: str) -> ChunkEntry | None:
        """The entry of a chunk that has not changed."""
        entry = self._chunks[chunk.tensor].get(chunk.start)
        if entry is None or entry.nbytes != chunk.nbytes or entry.fingerprint != fingerprint:
            return None
        return entry


def _chunks(entry: TensorEntry | None, spec: Spec, usable: frozenset[str]) -> dict[int, ChunkEntry]:
    if entry is None or entry.spec.dtype != spec.dtype:
        return {}
    return {chunk.start: chunk for chunk in entry.chunks if chunk.extent.segment in usable}


def _usable(previous: Manifest, store: Store) -> frozenset[str]:
    """The segments that are there, and of which enough is in use."""
    live: Counter[str] = Counter()
    for entry in previous.tensors:
        for chunk in entry.chunks:
            live[chunk.extent.segment] += chunk.extent.length
    found = set()
    for name, nbytes in live.items():
        with contextlib.suppress(CheckpointError):
            if nbytes >= LEAST_LIVE * store.size(name):
                found.add(name)
    return frozenset(found)
