"""A state in host memory as a source, and a source's structure as a state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gpuckpt.arrays import gather, host_view
from gpuckpt.census import take_inventory
from gpuckpt.conversion.port import PART_NBYTES, Outline
from gpuckpt.dtypes import to_numpy
from gpuckpt.structure import Mark


class StateSource:
    """A state of nested containers, arrays in host memory and plain values."""

    def __init__(self, state: Any) -> None:
        """The state is looked at as by a save, referred to, and not changed.

        Raises:
            UnsupportedError: a leaf is neither an array nor a plain value; it is named.
        """
        self._inventory = inventory = take_inventory(state)
        self.outline = Outline(inventory.structure, inventory.specs)

    def read(self, position: int) -> Iterator[memoryview]:
        """The bytes of an array, in C order however it lies in memory."""
        inventory = self._inventory
        spec, strides = inventory.specs[position], inventory.roster.strides[position]
        array = host_view(int(inventory.addresses[position]), spec, strides)
        item = to_numpy(spec.dtype).itemsize
        step = max(PART_NBYTES // item, 1) * item
        room = np.empty(min(spec.nbytes, step), np.uint8)
        for at in range(0, spec.nbytes, step):
            part = room[: min(step, spec.nbytes - at)]
            gather(array, at, part)
            yield part.data


def filled(tree: Any, arrays: Sequence[Any]) -> Any:
    """A tree of containers (`structure.from_json`) with an array for each of its marks."""
    if isinstance(tree, Mark):
        return arrays[tree.tensor]
    if isinstance(tree, dict):
        return {key: filled(child, arrays) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([filled(child, arrays) for child in tree])
    return tree
