"""Sharded: an array that is a part of a larger one, which many processes hold together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

from gpuckpt.boxes import Box, Shape
from gpuckpt.errors import InvalidError


@dataclass(frozen=True, slots=True, eq=False)
class Sharded:
    """This rank's box of a tensor that the ranks hold together: a leaf of the state.

    `array` is an array of any library, on any device, and stays the caller's:
    it is saved from and restored into where it is.  `shape` is that of the
    whole tensor, `offset` the index of the box's first element in it; the
    box's own shape is the array's.  A box may be empty (a rank that has no
    rows) and may overlap with others', if both hold the same bytes there.  One
    that is all of the tensor is saved as the array alone would be.

    ```python
    state["table"] = gpuckpt.Sharded(rows, shape=(1_000_000, 64), offset=(first_row, 0))
    ```

    Raises:
        InvalidError: the array has no shape, or its box isn't within the tensor.
    """

    array: Any
    shape: Sequence[int]
    offset: Sequence[int]

    def __post_init__(self) -> None:
        own = _shape_of(self.array)
        for field in ("shape", "offset"):
            object.__setattr__(self, field, _counts(getattr(self, field), field))
        if not len(own) == len(self.shape) == len(self.offset):
            raise InvalidError(
                f"Sharded: array, shape and offset have as many axes as each other; got "
                f"{len(own)}, {len(self.shape)} and {len(self.offset)}"
            )
        box = Box(tuple(self.offset), own)
        if not box.fits(tuple(self.shape)):
            raise InvalidError(f"Sharded: {box} isn't in a tensor of shape {self.shape}")

    @property
    def box(self) -> Box:
        """Which part of the whole tensor the array is."""
        return Box(tuple(self.offset), _shape_of(self.array))

    def __repr__(self) -> str:
        return f"Sharded({self.box} of {self.shape})"


def _shape_of(array: Any) -> Shape:
    shape = getattr(array, "shape", None)
    for interface in ("__array_interface__", "__cuda_array_interface__"):
        if shape is None:
            shape = getattr(array, interface, {}).get("shape")
    if shape is None or isinstance(array, Sharded):
        kind = type(array).__name__
        raise InvalidError(f"Sharded: an array with a shape is needed, got {kind!r}")
    return tuple(map(int, shape))


def _counts(given: Any, field: str) -> Shape:
    try:
        counts = tuple(map(index, given))
    except TypeError:
        raise InvalidError(
            f"Sharded: {field} is one integer for each axis, got {given!r}"
        ) from None
    if min(counts, default=0) < 0:
        raise InvalidError(f"Sharded: {field} can't be negative, got {given!r}")
    return counts
