"""Which rank writes which bytes of what several ranks hold.

Ranks tell each other once what they hold: rows of names, types and boxes.
What one rank alone holds it writes.  Of what several hold alike (replicas),
the large is cut along its first axis, a piece for each of them; the small goes to
whoever has the least, and the tiny, where ranks may well differ (statistics of
a batch), to the first of them.  Every rank comes to the same result by itself.

Pieces of replicas that have drifted apart would make a state that no rank had.
So all of them write one small sample too, which must be the same.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gpuckpt.boxes import Box, gap, whole_box
from gpuckpt.cutting import Reshard, cut_for
from gpuckpt.dtypes import to_numpy
from gpuckpt.errors import RankError
from gpuckpt.inventory import Inventory, Roster
from gpuckpt.spec import Spec
from gpuckpt.structure import numbered

# A piece of what several hold has so many elements, or more.
PIECE_COUNT = 16 << 10
SAMPLE_COUNT = 4 << 10
TINY_NBYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Holding:
    """What a rank holds, of which others may hold the same: name, type, whole shape and box."""

    name: str
    dtype: str
    whole: tuple[int, ...]
    box: Box

    @property
    def nbytes(self) -> int:
        """Bytes of its box."""
        return self.box.count * to_numpy(self.dtype).itemsize


def holdings(roster: Roster) -> list[Holding]:
    """What a rank holds that others may hold too: all but what is its own."""
    return [
        Holding(spec.name, spec.dtype, spec.full_shape, spec.box)
        for at, spec in enumerate(roster.specs)
        if at not in roster.private
    ]


def pack_holdings(held: Sequence[Holding]) -> bytes:
    """As JSON, for the other ranks."""
    rows = [[one.name, one.dtype, one.whole, one.box.offset, one.box.shape] for one in held]
    return json.dumps(rows, separators=(",", ":")).encode()


def unpack_holdings(data: bytes) -> list[Holding]:
    """The inverse of `pack_holdings`."""
    return [
        Holding(name, dtype, tuple(whole), Box(tuple(offset), tuple(shape)))
        for name, dtype, whole, offset, shape in json.loads(data)
    ]


def digest(held: Sequence[Holding]) -> str:
    """The same for two ranks' holdings exactly if they are equal."""
    return hashlib.sha256(pack_holdings(held)).hexdigest()[:32]


def share_out(held: Sequence[Sequence[Holding]]) -> list[dict[Holding, tuple[Box, ...]]]:
    """The boxes that each rank writes of each of its holdings, by rank.

    Raises:
        RankError: two ranks have one name for different tensors, or some
            elements of one are held by no rank.
    """
    holders: dict[Holding, list[int]] = {}
    for rank, every in enumerate(held):
        for one in every:
            holders.setdefault(one, []).append(rank)
    _check(holders)
    division = _Division(len(held))
    whole = [pair for pair in holders.items() if not division.cut(*pair)]
    for one, ranks in sorted(whole, key=lambda pair: -pair[0].nbytes):
        division.give(one, ranks)
    division.add_samples()
    return division.shares


class _Division:
    """Who writes what, while it is shared out."""

    def __init__(self, count: int) -> None:
        self.shares: list[dict[Holding, tuple[Box, ...]]] = [{} for _ in range(count)]
        self._loads = [0] * count
        self._sampled: dict[tuple[int, ...], Holding] = {}

    def cut(self, one: Holding, ranks: Sequence[int]) -> bool:
        """Give each of several ranks a piece, if that is worth it; whether it is."""
        pieces = _pieces(one, len(ranks))
        if len(pieces) == 1:
            return False
        for at, piece in enumerate(pieces):
            self._add(ranks[at * len(ranks) // len(pieces)], one, piece)
        largest = self._sampled.setdefault(tuple(ranks), one)
        if one.nbytes > largest.nbytes:
            self._sampled[tuple(ranks)] = one
        return True

    def give(self, one: Holding, ranks: Sequence[int]) -> None:
        """Give it to one of them, but for a single element, which all write: it has no rows."""
        if one.box.shape:
            first = ranks[0] if one.nbytes < TINY_NBYTES else None
            least = min(ranks, key=lambda rank: (self._loads[rank], rank))
            self._add(least if first is None else first, one, one.box)

    def add_samples(self) -> None:
        """Of the largest that some ranks hold together, all of them write a little."""
        for ranks, one in self._sampled.items():
            for rank in ranks:
                self._add(rank, one, sample_of(one.box))

    def _add(self, rank: int, one: Holding, box: Box) -> None:
        self.shares[rank][one] = (*self.shares[rank].get(one, ()), box)
        self._loads[rank] += box.count * to_numpy(one.dtype).itemsize


def sample_of(box: Box) -> Box:
    """The first elements of a box: few enough that all who hold it can write them, too."""
    shape, left = [1] * len(box.shape), SAMPLE_COUNT
    for axis in reversed(range(len(shape))):
        shape[axis] = min(box.shape[axis], left)
        left //= shape[axis]
    return Box(box.offset, tuple(shape))


def _pieces(one: Holding, count: int) -> list[Box]:
    """A box cut along its first axis that has more than one index, evenly, into few enough."""
    count = min(count, one.box.count // PIECE_COUNT)
    axis = next((at for at, extent in enumerate(one.box.shape) if extent > 1), None)
    if count < 2 or axis is None:
        return [one.box]
    count = min(count, one.box.shape[axis])
    edges = [one.box.shape[axis] * at // count for at in range(count + 1)]
    pieces = []
    for first, last in itertools.pairwise(edges):
        offset, shape = list(one.box.offset), list(one.box.shape)
        offset[axis], shape[axis] = offset[axis] + first, last - first
        pieces.append(Box(tuple(offset), tuple(shape)))
    return pieces


def _check(holders: dict[Holding, list[int]]) -> None:
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
                f"{name}{hole} is held by no rank; its shape is {list(first[name].whole)}",
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
        self, rank: int, held: Sequence[Sequence[Holding]], reshard: Reshard = "none"
    ) -> None:
        """`held` is what each rank holds; raises what `share_out` does.

        `reshard` says how rows are cut for ranks that hold other boxes (`cutting`).
        """
        self._reshard = reshard
        self.digests = tuple(digest(one) for one in held)
        self._rank = rank
        self._told: dict[Holding, tuple[Box, ...]] = dict.fromkeys(held[rank], ())
        self._told |= share_out(held)[rank]
        self.samples = frozenset(
            f"{one.name}{box}"
            for one, boxes in self._told.items()
            for box in boxes
            if box == sample_of(one.box)
        )
        """The labels of the rows that all who hold them write, which must be the same."""
        self._known: tuple[Roster | None, _Cut | None] = None, None
        self._digested: tuple[Roster | None, str] = None, ""

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
        rows = [_row(spec, box) for box in boxes or (Box(spec.box.offset, (0, *spec.shape[1:])),)]
        return [part for row in rows for part in self._parts(row)]

    def _parts(self, row: Spec) -> list[Spec]:
        if row.label in self.samples:
            return [row]
        return [_row(row, box) for box in cut_for(row, self._reshard)]


def _row(spec: Spec, box: Box) -> Spec:
    """The row of a part of what a spec has."""
    if box == spec.box:
        return spec
    return replace(spec, shape=box.shape, axes=None, offset=box.offset, whole=spec.full_shape)


def _distance(held: Spec, row: Spec, strides: Sequence[int]) -> int:
    inside = row.box.inside(held.box)
    return (
        sum(at * step for at, step in zip(inside.offset, strides, strict=True)) if row.nbytes else 0
    )
