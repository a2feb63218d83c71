"""What a state consists of, found out quickly when it is the state of last time."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuckpt.arrays import (
    LIBRARIES,
    Addresses,
    Facts,
    Library,
    Tensor,
    facts,
    locate,
    look,
)
from gpuckpt.errors import UnsupportedError
from gpuckpt.inventory import Inventory, Roster
from gpuckpt.outline import Kind, Outline
from gpuckpt.spec import Spec
from gpuckpt.tree import Flat, flatten
from gpuckpt.values import Json, NotPlainError, encode_value

Leaves = dict[Kind, list[Any]]

ARRAYS: tuple[Kind, ...] = (*LIBRARIES, "other")


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
    which `outline` finds them; `values` sorts the plain ones.  Arrays are
    numbered in that order, kind by kind: `positions` has each one's tensor in
    the roster, `firsts` the first array of each tensor (None: they are the
    tensors), `layouts` a number for all of its `Tensor.where` but the address,
    `empty` the arrays without elements.  `facts` are those of arrays that are
    read in bulk, `others` the specs (under their own names) and strides of
    those that are looked at one by one.  `addresses` are the last that were seen.
    """

    roster: Roster
    outline: Outline
    order: dict[Kind, list[int]]
    facts: dict[Library, Facts]
    others: list[tuple[Spec, tuple[int, ...]]]
    positions: list[int]
    firsts: list[int] | None
    layouts: list[int]
    empty: list[int]
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
        for library, before in self.facts.items():
            located = locate(leaves[library], before)
            if located is None:
                return None
            found.append(located[0])
            owners += located[1]
        for leaf, (spec, strides) in zip(leaves.get("other", ()), self.others, strict=True):
            tensor = look(leaf, spec.name)
            if tensor is None or (tensor.spec, tensor.strides) != (spec, strides):
                return None
            found.append(np.array([tensor.address], np.uint64))
            owners.append(tensor.owner)
        addresses = np.concatenate(found)
        addresses[self.empty] = 0
        addresses.flags.writeable = False
        whole = int(np.count_nonzero(addresses)) == addresses.size - len(self.empty)
        return (addresses, owners) if whole else None

    def _shared_alike(self, leaves: Leaves, addresses: Addresses) -> bool:
        """Whether the same names are one array as before."""
        if len(self.empty) > 1:
            arrays = [leaf for kind in ARRAYS for leaf in leaves.get(kind, ())]
            pairs = [(id(arrays[at]), self.positions[at]) for at in self.empty]
            if not _one_to_one(pairs):
                return False
        if np.array_equal(addresses, self.addresses):
            return True
        none_shared = len(self.positions) == len(self.roster.specs)
        different = len(set(addresses.tolist())) - (len(self.empty) > 0)
        if none_shared and different == addresses.size - len(self.empty):
            return True
        empty = frozenset(self.empty)
        rows = zip(self.layouts, addresses.tolist(), self.positions, strict=True)
        return _one_to_one(
            [
                ((layout, address), position)
                for at, (layout, address, position) in enumerate(rows)
                if at not in empty
            ]
        )


class _Survey:
    """A state of which nothing is known: every leaf is looked at by itself.

    `seen` has a tensor or None for each leaf, `positions` which tensor of the
    roster it is, or -1.
    """

    def __init__(self, flat: Flat) -> None:
        self.flat = flat
        self.seen: list[Tensor | None] = []
        self.positions: list[int] = []
        self._tensors: list[Tensor] = []
        self._values: list[Json] = []
        known: dict[Hashable, int] = {}
        for leaf, name in zip(flat.leaves, flat.names, strict=True):
            tensor = look(leaf.leaf, name)
            self.seen.append(tensor)
            if tensor is None:
                leaf.node["value"] = _encoded(leaf.leaf, name)
                self._values.append(leaf.node["value"])
                self.positions.append(-1)
                continue
            where = tensor.where if tensor.spec.nbytes else id(leaf.leaf)
            position = known.setdefault(where, len(self._tensors))
            if position == len(self._tensors):
                self._tensors.append(tensor)
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
    if any(survey.seen[at] is not None for at in plain):
        return None
    libraries = [kind for kind in LIBRARIES if kind in order]
    arrays = [at for kind in ARRAYS for at in order.get(kind, ())]
    tensors = [tensor for at in arrays if (tensor := survey.seen[at]) is not None]
    if len(tensors) != len(arrays):
        return None
    leaves = survey.leaves(order)
    positions = [survey.positions[at] for at in arrays]
    others = tensors[len(tensors) - len(order.get("other", ())) :]
    layouts: dict[Hashable, int] = {}
    return _Memory(
        roster=roster,
        outline=outline,
        order=order,
        facts={library: facts(library, leaves[library]) for library in libraries},
        others=[(tensor.spec, tensor.strides) for tensor in others],
        positions=positions,
        firsts=_firsts(positions, len(roster.specs)),
        layouts=[layouts.setdefault(tensor.layout, len(layouts)) for tensor in tensors],
        empty=[at for at, tensor in enumerate(tensors) if not tensor.spec.nbytes],
        values=sorted(range(len(plain)), key=plain.__getitem__),
        addresses=np.empty(0, np.uint64),
    )


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
