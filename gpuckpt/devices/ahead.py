"""Host memory to which a GPU's held tensors are brought at once, ahead of the slots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from gpuckpt.devices import Bytes, kernels
from gpuckpt.devices.tables import Tables
from gpuckpt.plan import aligned


@dataclass(frozen=True, slots=True)
class Room:
    """Page-locked memory for one step: a table on its way there, and what comes back."""

    table: Bytes
    found: Bytes


@dataclass(frozen=True, slots=True)
class Ahead:
    """Where each batch and each second look has its room, as far as there is memory.

    The slots hand chunks on as fast as the disk takes them, and an update of
    what is held waits for the last read.  What has room of its own needn't
    wait for a slot.  `nbytes` are as few as possible.  Where not all fit, the
    last batches have room: the first ones then go through the slots
    meanwhile, and so do the second looks, which come after every read.
    """

    nbytes: int
    batches: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    looks: tuple[tuple[int, int, int], ...] = ()
    is_whole: bool = False

    @classmethod
    def within(cls, nbytes: int, batches: Tables, looks: Tables) -> Ahead:
        """What `nbytes` of memory are enough for."""
        places, end = _placed([*_looks(looks)], 0)
        first, found = batches.groups, {}
        while first:
            place, after = _placed([_batch(batches, first - 1)], end)
            if after > nbytes:
                break
            first, end = first - 1, after
            found[first] = place[0]
        if not found:
            return cls(0)
        ascending = dict(sorted(found.items()))
        return cls(end, ascending, tuple(places), is_whole=first == 0)

    def room(self, place: tuple[int, int, int], memory: Bytes) -> Room:
        """A place in page-locked `memory`, which has `nbytes` bytes at least."""
        start, middle, end = place
        return Room(memory[start:middle], memory[middle:end])


def _looks(looks: Tables) -> Iterator[tuple[int, int]]:
    for at in range(looks.groups):
        yield looks.table_nbytes(at), looks.leaves(at) * kernels.DIGEST_NBYTES


def _batch(batches: Tables, at: int) -> tuple[int, int]:
    summaries, planes = batches.spans(at)
    return batches.table_nbytes(at), summaries.nbytes + planes.nbytes


def _placed(sizes: list[tuple[int, int]], end: int) -> tuple[list[tuple[int, int, int]], int]:
    """Where tables and what comes back begin and end, from `end` on; where the last ends."""
    places = []
    for table, found in sizes:
        middle = end + aligned(table)
        places.append((end, middle, middle + found))
        end = middle + aligned(found)
    return places, end
