"""Host memory to which a GPU's held tensors are brought at once, ahead of the slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpuckpt.devices import Bytes, kernels
from gpuckpt.devices.merging import Span
from gpuckpt.devices.tables import Tables
from gpuckpt.plan import aligned


@dataclass(frozen=True, slots=True)
class Rooms:
    """Where some groups' tables, one after the other, and what comes back of each have room."""

    groups: range
    table: Span
    found: tuple[Span, ...]

    def at(self, group: int, memory: Bytes) -> Bytes:
        """The part of page-locked `memory` for what comes back of a group."""
        place = self.found[group - self.groups.start]
        return memory[place.start : place.end]


NOWHERE = Rooms(range(0), Span(0, 0), ())


@dataclass(frozen=True, slots=True)
class Ahead:
    """Where batches and second looks have room of their own, as far as there is memory.

    The slots hand chunks on as fast as the disk takes them, and an update of
    what is held waits for the last read.  What has room of its own needn't
    wait for a slot.  `nbytes` are as few as possible.  Where not all fit, the
    last batches have room, and are read first: what is left goes through the
    slots, and then the second looks, which come after every read.
    """

    nbytes: int = 0
    batches: Rooms = NOWHERE
    looks: Rooms = NOWHERE

    @property
    def is_whole(self) -> bool:
        """Whether nothing needs a slot."""
        return bool(self.batches.found) and not self.batches.groups.start

    @classmethod
    def within(cls, nbytes: int, batches: Tables, looks: Tables) -> Ahead:
        """What `nbytes` of memory are enough for."""
        digests = [looks.leaves(at) * kernels.DIGEST_NBYTES for at in range(looks.groups)]
        seen, end = _placed(0, range(looks.groups), looks, digests)
        sizes = [sum(span.nbytes for span in batches.spans(at)) for at in range(batches.groups)]
        first, room = batches.groups, nbytes - end
        while first:
            room -= batches.table_nbytes(first - 1) + aligned(sizes[first - 1])
            if room < 0:
                break
            first -= 1
        groups = range(first, batches.groups)
        if not groups:
            return cls()
        brought, end = _placed(end, groups, batches, sizes[first:])
        return cls(end, brought, seen)


def _placed(start: int, groups: range, tables: Tables, sizes: Sequence[int]) -> tuple[Rooms, int]:
    """Room from `start` on, and where it ends."""
    table = Span(start, sum(map(tables.table_nbytes, groups)))
    found, end = [], table.end
    for nbytes in sizes:
        found.append(Span(end, nbytes))
        end += aligned(nbytes)
    return Rooms(groups, table, tuple(found)), end
