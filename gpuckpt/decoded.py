"""Look at decoded bytes, in bounded memory: of chunks in several threads, or of boxes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from gpuckpt.arena import Slot
from gpuckpt.arrays import make
from gpuckpt.boxes import Box
from gpuckpt.ordered import ordered_map
from gpuckpt.portions import jobs_of
from gpuckpt.reading import Bytes, Job, check_chunk
from gpuckpt.resources import Resources
from gpuckpt.restore import restore_tensors
from gpuckpt.shards import Shards
from gpuckpt.spec import ChunkEntry
from gpuckpt.stores import Store

K = TypeVar("K")
R = TypeVar("R")

# The fewest slots that an arena has.
TOGETHER_MAX = 2


@dataclass(frozen=True, slots=True)
class Group(Generic[K]):
    """One chunk, or two that are to be looked at beside each other; `key` says what for."""

    key: K
    chunks: tuple[tuple[Job, ChunkEntry], ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.chunks) <= TOGETHER_MAX:
            raise ValueError(f"{len(self.chunks)} chunks at a time, 1 or {TOGETHER_MAX} are read")


@dataclass(frozen=True, slots=True)
class _Piece(Generic[K]):
    group: Group[K]
    slots: tuple[Slot, ...]


def look_at_all(
    groups: Iterable[Group[K]],
    look: Callable[[K, list[Bytes]], R],
    resources: Resources,
    *,
    largest_nbytes: int,
) -> Generator[R, None, None]:
    """Yield `look(key, raw bytes of its chunks)` for each group, in order.

    `look` runs in several threads, and the bytes are its own only until it
    returns.  Each chunk is checked before it is seen.  No chunk is larger than
    `largest_nbytes`.

    Raises:
        CorruptError: a chunk isn't what was written; it names tensor, file and offset.
    """
    arena = resources.arena(["cpu"], largest_nbytes)

    def pieces() -> Iterator[_Piece[K]]:
        for group in groups:
            yield _Piece(group, tuple(arena.take() for _ in group.chunks))

    def work(piece: _Piece[K]) -> tuple[_Piece[K], R]:
        pairs = zip(piece.group.chunks, piece.slots, strict=True)
        raws = [check_chunk(job, chunk, slot, arena) for (job, chunk), slot in pairs]
        return piece, look(piece.group.key, raws)

    def drop(piece: _Piece[K]) -> None:
        for slot in piece.slots:
            arena.give(slot)

    for piece, found in ordered_map(work, pieces(), workers=resources.workers, drop=drop):
        drop(piece)
        yield found


def read_box(store: Store, shards: Shards, position: int, box: Box, resources: Resources) -> Any:
    """A part of a tensor, whatever shards it is in: a new numpy array in C order.

    All of it must be there (`Shards.lack`).

    Raises:
        CorruptError: bytes aren't what was written.
    """
    spec = replace(shards.spec(position, box), kind="numpy", device="cpu", axes=None)
    target = make(spec, resources.devices["cpu"])
    restore_tensors(list(jobs_of(shards, store, {position: [target]})), resources)
    return target.array
