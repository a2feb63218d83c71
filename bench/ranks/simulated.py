"""Ranks that aren't there: what they would have written, and what they would say."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np

from gpuckpt import layout
from gpuckpt.groups import Group
from gpuckpt.inventory import Inventory
from gpuckpt.manifest import Manifest
from gpuckpt.plan import plan_chunks
from gpuckpt.spec import Chunk, ChunkEntry, Extent, Plane, Spec
from gpuckpt.statistics import Statistics
from gpuckpt.tensors import TensorEntry

# Of half of the raw bytes: what signs and exponents of bfloat16 weights take, coded.
_CODED = 0.35
_CREATED, _WRITER = 1_790_000_000.0, "gpuckpt 0.1 on node-0000"


def written(inventory: Inventory, step: int, rank: int) -> Manifest:
    """The manifest of a rank's rows, as a save makes it; nothing is written."""
    random = np.random.default_rng((step, rank))
    segment = layout.segment_name(step, f"{rank:08x}", rank, 0)
    specs, offset = inventory.specs, layout.HEADER.size
    chunks: list[list[ChunkEntry]] = [[] for _ in specs]
    for chunk in plan_chunks(specs, chunk_nbytes=layout.CHUNK_NBYTES):
        entry = _entry(chunk, specs[chunk.tensor], segment, offset, random)
        chunks[chunk.tensor].append(entry)
        offset += entry.extent.length
    rows = (
        TensorEntry(spec, tuple(own), step, _statistics(spec))
        for spec, own in zip(specs, chunks, strict=True)
    )
    return Manifest(
        *(step, inventory.roster.filled(inventory.values), tuple(rows)),
        epoch=step // 100,
        metrics={"loss": 2.25},
        created=_CREATED,
        writer=_WRITER,
    )


def _entry(
    chunk: Chunk, spec: Spec, segment: str, offset: int, random: np.random.Generator
) -> ChunkEntry:
    half = chunk.nbytes // 2
    planes: tuple[Plane, ...] = (Plane("raw", chunk.nbytes),)
    if spec.width == 2:
        planes = Plane("zstd", int(_CODED * half)), Plane("raw", half)
    extent = Extent(segment, offset, sum(plane.length for plane in planes))
    fingerprint, checksum = random.bytes(16).hex(), random.bytes(8).hex()
    return ChunkEntry(chunk.start, chunk.nbytes, extent, fingerprint, checksum, planes)


def _statistics(spec: Spec) -> Statistics | None:
    return None if spec.dtype == "uint8" else Statistics(0, 0, spec.nbytes / 3.0)


class Heard(Exception):  # noqa: N818 - no error
    """What a rank gave."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.data = data


class Scripted:
    """A `Group` of which one rank is here; of each round `others` know what the others gave.

    `given` has the bytes that this rank gave in each round, `got` those that it got.
    """

    def __init__(
        self, rank: int, size: int, others: Callable[[int, bytes], Sequence[bytes]]
    ) -> None:
        self.rank, self.size, self._others = rank, size, others
        self.given: list[int] = []
        self.got: list[int] = []

    def all_gather(self, data: bytes, *, what: str, timeout: float) -> list[bytes]:  # noqa: ARG002
        """What all gave."""
        told = list(self._others(len(self.given), data))
        told[self.rank] = data
        self.given.append(len(data))
        self.got.append(sum(map(len, told)))
        return told

    def decide(
        self, data: bytes, choose: Callable[[list[bytes]], bytes], *, what: str, timeout: float
    ) -> bytes:
        """What it chooses, if this is rank 0."""
        told = self.all_gather(data, what=what, timeout=timeout)
        chosen = choose(told) if self.rank == 0 else b""
        self.got[-1] = len(chosen)
        return chosen

    def barrier(self, *, what: str, timeout: float) -> None:
        """Nobody waits."""


def rounds_of(ranks: int, begin: Callable[[Group], object], rounds: int) -> list[list[bytes]]:
    """What each rank gives in the first rounds of what `begin` begins, each by the real code.

    Each rank begins anew for each round, and is told what all gave before.
    """
    told: list[list[bytes]] = []
    for _ in range(rounds):
        heard = []
        for rank in range(ranks):
            try:
                begin(Scripted(rank, ranks, lambda at, data: _told(told, at, data)))
            except Heard as found:
                heard.append(found.data)
            else:  # there is no such round
                return told
        told.append(heard)
    return told


def _told(told: Sequence[list[bytes]], number: int, data: bytes) -> Sequence[bytes]:
    if number < len(told):
        return told[number]
    raise Heard(data)


def echoed(ranks: int, data: bytes) -> list[bytes]:
    """What all say to whom rank 0 says this, each of files of its own."""
    answer = json.loads(data)["answer"]
    if not isinstance(answer, dict) or "part" not in answer:
        return [data] * ranks
    before, *after = data.split(b".r0.")
    return [(b".r%d." % rank).join([before, *after]) for rank in range(ranks)]
