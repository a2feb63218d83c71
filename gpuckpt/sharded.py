"""Sharded: an array that is a part of a larger one, which many processes hold together."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

from gpuckpt.boxes import Box, Shape
from gpuckpt.errors import InvalidError


class Sharded:
    """This rank's box of a tensor that the ranks hold together: a leaf of the state.

    `array` is an array of any library, on any device, and stays the caller's:
    it is saved from and restored into where it is.  `shape` is that of the
    whole tensor, `offset` the index of the box's first element in it; the
    box's own shape is the array's.  A box may be empty (a rank that has no
    rows) and may overlap with others', if both hold the same bytes there.  One
    that is all of the tensor is saved as the array alone would be.  `array` may be
    replaced by another of its shape, as `leaf.array += 1` does.

    ```python
    state["table"] = gpuckpt.Sharded(rows, shape=(1_000_000, 64), offset=(first_row, 0))
    ```

    Raises:
        InvalidError: the array has no shape, or its box isn't within the tensor.
    """

    __slots__ = ("array", "offset", "shape")

    array: Any
    shape: Shape
    offset: Shape

    def __init__(self, array: Any, shape: Sequence[int], offset: Sequence[int]) -> None:
        own = _shape_of(array)
        place = _counts(shape, "shape"), _counts(offset, "offset")
        if not len(own) == len(place[0]) == len(place[1]):
            raise InvalidError(
                f"Sharded: array, shape and offset have as many axes as each other; got "
                f"{len(own)}, {len(place[0])} and {len(place[1])}"
            )
        box = Box(place[1], own)
        if not box.fits(place[0]):
            raise InvalidError(f"Sharded: {box} isn't in a tensor of shape {place[0]}")
        for name, value in zip(("array", "shape", "offset"), (array, *place), strict=True):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "array" or _shape_of(value) != _shape_of(self.array):
            raise InvalidError(
                "Sharded: only its array can be replaced, by one of its shape "
                f"{_shape_of(self.array)}; make another Sharded"
            )
        object.__setattr__(self, name, value)

    @property
    def box(self) -> Box:
        """Which part of the whole tensor the array is."""
        return Box(self.offset, _shape_of(self.array))

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
