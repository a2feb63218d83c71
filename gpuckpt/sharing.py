"""Which rank writes which bytes of what several ranks hold.

Ranks tell each other once what they hold (`holdings`).
What one rank alone holds it writes.  What several hold alike (replicas) is cut
into runs of the same size, one for each of them (`spreading`); the tiny, where
ranks may well differ (statistics of a batch), goes to the first of them.  Every
rank comes to the same result by itself.  Where machines have roots of their own,
each root gets all that its ranks hold.

Pieces of replicas that have drifted apart would make a state that no rank had.
So all of them write one small sample too, which must be the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gpuckpt.boxes import Box, gap, whole_box
from gpuckpt.cutting import Reshard, row_of, rows_for
from gpuckpt.dtypes import to_numpy
from gpuckpt.errors import RankError
from gpuckpt.holdings import Holding, digest, holdings
from gpuckpt.inventory import Inventory, Roster
from gpuckpt.spec import Spec
from gpuckpt.spreading import spread
from gpuckpt.structure import numbered
from gpuckpt.tensors import TensorEntry

SAMPLE_COUNT = 4 << 10
TINY_NBYTES = 16 << 10

Shared = dict[tuple[int, ...], list[Holding]]


def written_holdings(entries: Iterable[TensorEntry]) -> list[Holding]:
    """What a rank has written of what others may hold too."""
    specs = (entry.spec for entry in entries)
    return [
        Holding(spec.name, spec.dtype, spec.full_shape, spec.box)
        for spec in specs
        if spec.rank is None
    ]


def share_out(
    held: Sequence[Sequence[Holding]], leads: Sequence[int] | None = None
) -> list[dict[Holding, tuple[Box, ...]]]:
    """The boxes that each rank writes of each of its holdings, by rank.

    `leads` has the lead of each rank's root; all have one unless it is given.
    Lists that are one object are looked at once.

    Raises:
        RankError: two ranks have one name for different tensors, or some
            elements of one are held by no rank.
    """
    check_fit(held)
    shares: list[dict[Holding, tuple[Box, ...]]] = [{} for _ in held]
    loads = [0] * len(held)
    holders = _holders(held)
    shared: Shared = {}
    for one, ranks in holders.items() if leads is None else _by_root(holders, leads):
        if not one.box.shape:
            continue  # all write it
        if len(ranks) > 1 and one.nbytes >= TINY_NBYTES:
            shared.setdefault(ranks, []).append(one)
        else:
            shares[ranks[0]][one] = (one.box,)
            loads[ranks[0]] += one.nbytes
    _spread(shared, shares, loads)
    for ranks, one in _sampled(holders):
        for rank in ranks:
            boxes = *shares[rank].get(one, ()), sample_of(one.box)
            shares[rank][one] = tuple(dict.fromkeys(boxes))  # a piece may be just that
    return shares


def _spread(shared: Shared, shares: list[dict[Holding, tuple[Box, ...]]], loads: list[int]) -> None:
    """Give each rank pieces of what several hold."""
    for ranks in sorted(shared, key=len):  # who has few to choose from comes first
        ones = shared[ranks]
        sizes = [to_numpy(one.dtype).itemsize for one in ones]
        found = spread([one.box for one in ones], sizes, [loads[rank] for rank in ranks])
        for rank, pieces in zip(ranks, found, strict=True):
            for at, piece in pieces:
                shares[rank][ones[at]] = (piece,)
                loads[rank] += piece.count * sizes[at]


def _by_root(
    holders: Mapping[Holding, tuple[int, ...]], leads: Sequence[int]
) -> Iterable[tuple[Holding, tuple[int, ...]]]:
    """What is held, once for each root, with the ranks that have that root."""
    for one, ranks in holders.items():
        for lead in dict.fromkeys(leads[rank] for rank in ranks):
            yield one, tuple(rank for rank in ranks if leads[rank] == lead)


def _sampled(
    holders: Mapping[Holding, tuple[int, ...]],
) -> Iterable[tuple[tuple[int, ...], Holding]]:
    """The largest that some ranks hold together."""
    largest: dict[tuple[int, ...], Holding] = {}
    for one, ranks in holders.items():
        if len(ranks) > 1 and one.nbytes >= TINY_NBYTES:
            known = largest.setdefault(ranks, one)
            largest[ranks] = one if one.nbytes > known.nbytes else known
    return largest.items()


def sample_of(box: Box) -> Box:
    """The first elements of a box: few enough that all who hold it can write them, too."""
    shape, left = [1] * len(box.shape), SAMPLE_COUNT
    for axis in reversed(range(len(shape))):
        shape[axis] = min(box.shape[axis], left)
        left //= max(shape[axis], 1)
    return Box(box.offset, tuple(shape))


def _holders(held: Sequence[Sequence[Holding]]) -> dict[Holding, tuple[int, ...]]:
    """The ranks that hold each of what is held."""
    alike: dict[int, list[int]] = {}
    for rank, every in enumerate(held):
        alike.setdefault(id(every), []).append(rank)
    found: dict[Holding, list[int]] = {}
    for ranks in alike.values():
        for one in held[ranks[0]]:
            found.setdefault(one, []).extend(ranks)
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    each = ((one, tuple(sorted(ranks))) for one, ranks in found.items())
    return {one: known.setdefault(ranks, ranks) for one, ranks in each}


def check_fit(held: Sequence[Sequence[Holding]]) -> None:
    """See that what ranks have under one name are boxes of one tensor, and all of it.

    Raises:
        RankError: they aren't.
    """
    holders = _holders(held)
    first: dict[str, Holding] = {}
    boxes: dict[str, list[Box]] = {}
    for one, ranks in holders.items():
        known = first.setdefault(one.name, one)
        if (known.dtype, known.whole) != (one.dtype, one.whole):
            here, there = (f"{o.dtype}{list(o.whole)}" for o in (known, one))
            raise RankError(
                [holders[known][0], ranks[0]],
                f"{one.name} is {here} on the one and {there} on the other; give them the same, "
                "or wrap what is each rank's own in gpuckpt.PerRank",
            )
        boxes.setdefault(one.name, []).append(one.box)
    for name, found in boxes.items():
        hole = gap(found, whole_box(first[name].whole))
        if hole is not None:
            raise RankError(
                sorted(
                    {rank for one, ranks in holders.items() if one.name == name for rank in ranks}
                ),
                f"{name}{hole} is held by no rank; its shape is {list(first[name].whole)}"
                + ("" if any(box.count for box in found) else _TIED),
            )


# Arrays without elements share no memory, so nobody sees there that they are tied.
_TIED = (
    ", and nobody has an element of it: if it is tied to another tensor on ranks that have some, "
    "give all ranks one and the same leaf under both names"
)


@dataclass(frozen=True, slots=True)
class _Cut:
    """What a rank writes of a roster: rows that are views of its tensors.

    `positions` are those of the tensors in the roster, `offsets` the bytes
    from a tensor's first element to its row's.
    """

    roster: Roster
    positions: npt.NDArray[np.intp]
    offsets: npt.NDArray[np.uint64]


class Shares:
    """What this rank writes, once the ranks know of each other; applied to its inventories."""

    def __init__(
        self,
        rank: int,
        told: Mapping[Holding, tuple[Box, ...]],
        digests: Sequence[str],
        reshard: Reshard,
    ) -> None:
        """`told` is what it writes of what it told others of, `digests` of what each told.

        `reshard` says how rows are cut for ranks that hold other boxes (`cutting`).
        """
        self._rank, self._told, self._reshard = rank, told, reshard
        self.digests = tuple(digests)
        self.samples = frozenset(
            f"{one.name}{box}"
            for one, boxes in self._told.items()
            for box in boxes
            if box == sample_of(one.box)
        )
        """The labels of the rows that all who hold them write, which must be the same."""
        self._known: tuple[Roster | None, _Cut | None] = None, None
        self._digested: tuple[Roster | None, str] = None, ""

    @classmethod
    def of(
        cls,
        rank: int,
        held: Sequence[Sequence[Holding]],
        digests: Sequence[str],
        leads: Sequence[int],
        reshard: Reshard,
    ) -> Shares:
        """Those of a rank, by what each holds, with its digest; raises what `share_out` does."""
        told = dict.fromkeys(held[rank], ()) | share_out(held, leads)[rank]
        return cls(rank, told, digests, reshard)

    def digest(self, roster: Roster) -> str:
        """That of the holdings as they are now."""
        known, found = self._digested
        if roster is not known:
            found = digest(holdings(roster))
            self._digested = roster, found
        return found

    def apply(self, inventory: Inventory) -> Inventory:
        """The inventory of what this rank writes: views into the same arrays.

        What it holds since they were told is written whole.  Of what others
        write, a row without elements is left: the structure names it.
        """
        known, cut = self._known
        if inventory.roster is not known or cut is None:
            cut = self._cut(inventory.roster)
            self._known = inventory.roster, cut
        owners = inventory.owners
        return Inventory(
            cut.roster,
            inventory.addresses[cut.positions] + cut.offsets,
            [owners[at] for at in cut.positions.tolist()],
            inventory.values,
        )

    def _cut(self, roster: Roster) -> _Cut:
        specs: list[Spec] = []
        positions: list[int] = []
        first: dict[int, int] = {}
        for at, spec in enumerate(roster.specs):
            first[at] = len(specs)
            own = at in roster.private
            specs += [replace(spec, rank=self._rank)] if own else self._rows(spec)
            positions += [at] * (len(specs) - len(positions))
        offsets = [
            _distance(roster.specs[at], spec, roster.strides[at])
            for at, spec in zip(positions, specs, strict=True)
        ]
        cut = Roster(
            numbered(roster.template, first),
            tuple(specs),
            tuple(roster.strides[at] for at in positions),
        )
        return _Cut(cut, np.array(positions, np.intp), np.array(offsets, np.uint64))

    def _rows(self, spec: Spec) -> list[Spec]:
        held = Holding(spec.name, spec.dtype, spec.full_shape, spec.box)
        boxes = self._told.get(held, (spec.box,))
        if not spec.shape:
            return [spec]  # all write it: there is no row of it without elements
        rows = [row_of(spec, box) for box in boxes or (Box(spec.box.offset, (0, *spec.shape[1:])),)]
        return [part for row in rows for part in self._parts(row)]

    def _parts(self, row: Spec) -> list[Spec]:
        if row.label in self.samples:
            return [row]
        return rows_for(row, self._reshard)


def _distance(held: Spec, row: Spec, strides: Sequence[int]) -> int:
    inside = row.box.inside(held.box)
    return (
        sum(at * step for at, step in zip(inside.offset, strides, strict=True)) if row.nbytes else 0
    )
