"""What a state consists of, found out quickly when it is the state of last time."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuckpt.arrays import (
    LIBRARIES,
    WRAPPINGS,
    Addresses,
    Facts,
    Library,
    Tensor,
    Wrapped,
    Wrapping,
    facts_of,
    locate_all,
    look_all,
)
from gpuckpt.errors import UnsupportedError
from gpuckpt.inventory import Inventory, Roster
from gpuckpt.outline import Kind, Outline
from gpuckpt.spec import Spec
from gpuckpt.tree import Flat, flatten
from gpuckpt.values import Json, NotPlainError, encode_value

Leaves = dict[Kind, list[Any]]

Seen = tuple[tuple[Spec, tuple[int, ...]], ...]

# What may be read in bulk.
BULK: tuple[Library | Wrapping, ...] = (*LIBRARIES, *WRAPPINGS)


class Census:
    """Takes inventories of a state that is mostly the same each time, in one thread at a time.

    What it remembers of the last state are types, keys, shapes and the like:
    it refers to no array between calls, and trusts none to be what it was.
    """

    def __init__(self) -> None:
        self._memory: _Memory | None = None

    def take(self, state: Any) -> Inventory:
        """List the state's leaves, and see that each can be saved; copies and changes nothing.

        Each object is asked for its `state_dict` once.  The roster is that of
        the last time as long as structure, types, shapes, strides, dtypes,
        devices, and which names are one array, are what they were.

        Raises:
            UnsupportedError: a leaf can't be saved; it names the leaf and says why.
        """
        asked: list[tuple[Any, Any]] = []
        if self._memory is not None:
            inventory = self._memory.recognise(state, asked)
            if inventory is not None:
                return inventory
        survey = _Survey(flatten(state, asked))
        inventory = survey.inventory()
        memory = _remember(survey, inventory.roster)
        if memory is None:
            return inventory
        again = memory.inventory_of(survey.leaves(memory.order))
        if again is None or not np.array_equal(again.addresses, inventory.addresses):
            return inventory  # one that doesn't know what it has just seen is of no use
        self._memory = memory
        return again


def take_inventory(state: Any) -> Inventory:
    """`Census.take`, for a state that is saved once."""
    return Census().take(state)


@dataclass(slots=True)
class _Memory:
    """What is remembered of a state, and compared at the next time.

    `order` has by kind the positions of leaves in the state, in the order in
    which `outline` finds them; `values` sorts the plain ones.  Tensors are
    numbered in that order, kind by kind: first those of leaves that are read
    in bulk, which are one each, and of which `facts` tell; then those of
    `others`, kinds whose leaves are looked at one by one, and which may be
    several shards each: `seen` has their specs (under their own names) and
    strides.  `positions` has each one's place in the roster, `firsts` the
    first of those that are one array (None: they are all different), `layouts`
    a number for all of its `Tensor.where` but the address, `empty` those
    without elements, each with its leaf's number.  `addresses` are the last
    that were seen.
    """

    roster: Roster
    outline: Outline
    order: dict[Kind, list[int]]
    facts: dict[Kind, Facts | Wrapped]
    others: list[Kind]
    seen: list[Seen]
    positions: list[int]
    firsts: list[int] | None
    layouts: list[int]
    empty: dict[int, int]
    values: list[int]
    addresses: Addresses

    def recognise(self, state: Any, asked: list[tuple[Any, Any]]) -> Inventory | None:
        """The state's inventory; None if it has changed by more than values and addresses."""
        leaves = self.outline.leaves(state, asked)
        return None if leaves is None else self.inventory_of(leaves)

    def inventory_of(self, leaves: Leaves) -> Inventory | None:
        """The inventory of a state with such leaves, in the outline's order."""
        try:
            encoded = [encode_value(value) for value in leaves.get("plain", ())]
            located = self._locate(leaves)
        except Exception:  # the survey finds out what it is, and whose
            return None
        if located is None:
            return None
        addresses, owners = located
        if not self._shared_alike(leaves, addresses):
            return None
        self.addresses = addresses
        if self.firsts is not None:
            addresses, owners = addresses[self.firsts], [owners[first] for first in self.firsts]
            addresses.flags.writeable = False
        values = tuple([encoded[at] for at in self.values])
        return Inventory(self.roster, addresses, owners, values)

    def _locate(self, leaves: Leaves) -> tuple[Addresses, list[Any]] | None:
        """Where the arrays are, and their owners; None if any of them is another than before."""
        found: list[Addresses] = [np.empty(0, np.uint64)]
        owners: list[Any] = []
        for kind, before in self.facts.items():
            located = locate_all(leaves[kind], before)
            if located is None:
                return None
            found.append(located[0])
            owners += located[1]
        others = [leaf for kind in self.others for leaf in leaves[kind]]
        for leaf, seen in zip(others, self.seen, strict=True):
            tensors = look_all(leaf, seen[0][0].name)
            if _seen(tensors) != seen:
                return None
            found.append(np.array([tensor.address for tensor in tensors], np.uint64))
            owners += [tensor.owner for tensor in tensors]
        addresses = np.concatenate(found)
        addresses[list(self.empty)] = 0
        addresses.flags.writeable = False
        whole = int(np.count_nonzero(addresses)) == addresses.size - len(self.empty)
        return (addresses, owners) if whole else None

    def _shared_alike(self, leaves: Leaves, addresses: Addresses) -> bool:
        """Whether the same names are one array as before."""
        if len(self.empty) > 1:
            arrays = [leaf for kind in (*self.facts, *self.others) for leaf in leaves[kind]]
            pairs = [(id(arrays[leaf]), self.positions[at]) for at, leaf in self.empty.items()]
            if not _one_to_one(pairs):
                return False
        if np.array_equal(addresses, self.addresses):
            return True
        none_shared = len(self.positions) == len(self.roster.specs)
        different = len(set(addresses.tolist())) - (len(self.empty) > 0)
        if none_shared and different == addresses.size - len(self.empty):
            return True
        rows = zip(self.layouts, addresses.tolist(), self.positions, strict=True)
        return _one_to_one(
            [
                ((layout, address), position)
                for at, (layout, address, position) in enumerate(rows)
                if at not in self.empty
            ]
        )


class _Survey:
    """A state of which nothing is known: every leaf is looked at by itself.

    `seen` has each leaf's tensors (none: a plain value), `positions` where the
    first of them is in the roster, or -1; the others follow it.
    """

    def __init__(self, flat: Flat) -> None:
        self.flat = flat
        self.seen: list[tuple[Tensor, ...]] = []
        self.positions: list[int] = []
        self._tensors: list[Tensor] = []
        self._values: list[Json] = []
        known: dict[Hashable, int] = {}
        for leaf, name in zip(flat.leaves, flat.names, strict=True):
            tensors = look_all(leaf.leaf, name)
            self.seen.append(tensors)
            if not tensors:
                leaf.node["value"] = _encoded(leaf.leaf, name)
                self._values.append(leaf.node["value"])
                self.positions.append(-1)
                continue
            where = tuple(one.where if one.spec.nbytes else id(leaf.leaf) for one in tensors)
            position = known.setdefault(where, len(self._tensors))
            if position == len(self._tensors):
                self._tensors += tensors
            leaf.node["tensor"] = position
            self.positions.append(position)

    def inventory(self) -> Inventory:
        """What has been seen."""
        specs = tuple(tensor.spec for tensor in self._tensors)
        strides = tuple(tensor.strides for tensor in self._tensors)
        addresses = np.array([tensor.address for tensor in self._tensors], np.uint64)
        owners = [tensor.owner for tensor in self._tensors]
        roster = Roster(self.flat.structure, specs, strides)
        return Inventory(roster, addresses, owners, tuple(self._values))

    def leaves(self, order: dict[Kind, list[int]]) -> Leaves:
        """The leaves, sorted as an outline does."""
        every = self.flat.leaves
        return {kind: [every[at].leaf for at in positions] for kind, positions in order.items()}


def _remember(survey: _Survey, roster: Roster) -> _Memory | None:
    """What to remember of a state; None if its types don't tell what its leaves are."""
    outline = Outline.of(survey.flat)
    if outline is None:
        return None
    order = outline.order(survey.flat)
    plain = order.get("plain", [])
    arrays = {kind: at for kind, at in order.items() if kind != "plain"}
    if any(survey.seen[at] for at in plain):
        return None
    if not all(survey.seen[at] for positions in arrays.values() for at in positions):
        return None
    leaves = survey.leaves(order)
    bulk: dict[Kind, Facts | Wrapped] = {
        kind: found
        for kind in BULK
        if kind in order and all(len(survey.seen[at]) == 1 for at in order[kind])
        if (found := facts_of(kind, leaves[kind])) is not None
    }
    others: list[Kind] = [kind for kind in arrays if kind not in bulk]
    numbered = [at for kind in (*bulk, *others) for at in order[kind]]
    rows = [
        (tensor, survey.positions[at] + shard, leaf)
        for leaf, at in enumerate(numbered)
        for shard, tensor in enumerate(survey.seen[at])
    ]
    positions = [position for _, position, _ in rows]
    layouts: dict[Hashable, int] = {}
    return _Memory(
        roster=roster,
        outline=outline,
        order=order,
        facts=bulk,
        others=others,
        seen=[_seen(survey.seen[at]) for kind in others for at in order[kind]],
        positions=positions,
        firsts=_firsts(positions, len(roster.specs)),
        layouts=[layouts.setdefault(tensor.layout, len(layouts)) for tensor, _, _ in rows],
        empty={at: leaf for at, (one, _, leaf) in enumerate(rows) if not one.spec.nbytes},
        values=sorted(range(len(plain)), key=plain.__getitem__),
        addresses=np.empty(0, np.uint64),
    )


def _seen(tensors: Sequence[Tensor]) -> Seen:
    """What is compared of tensors that are looked at again."""
    return tuple((tensor.spec, tensor.strides) for tensor in tensors)


def _firsts(positions: Sequence[int], count: int) -> list[int] | None:
    """Where each of `count` numbers comes first; None if they are there once each, in order."""
    if list(positions) == list(range(count)):
        return None
    found: dict[int, int] = {}
    for at, position in enumerate(positions):
        found.setdefault(position, at)
    return [found[position] for position in range(count)]


def _one_to_one(pairs: Sequence[tuple[Hashable, int]]) -> bool:
    """Whether equal firsts have equal seconds, and different ones different ones."""
    count = len(set(pairs))
    return count == len({one for one, _ in pairs}) == len({other for _, other in pairs})


def _encoded(leaf: Any, name: str) -> Json:
    try:
        return encode_value(leaf)
    except NotPlainError as error:
        raise UnsupportedError(
            name,
            f"{error} can't be saved; a leaf is an array, a plain value (int, float, complex, "
            "str, bytes, bool, None), or has state_dict and load_state_dict",
        ) from None
