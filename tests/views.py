"""Arrays to try devices with: of any bits, seen through any strides."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

SHAPE = (6, 10, 14)
# Views of an array of `SHAPE`: the same function makes them of numpy's and of cupy's arrays.
VIEWS: dict[str, Callable[[Any], Any]] = {
    "contiguous": lambda a: a,
    "part": lambda a: a[2:5],
    "transposed": lambda a: a.transpose(2, 0, 1),
    "Fortran": lambda a: a.T,
    "stepped": lambda a: a[::2, 1::3],
    "reversed": lambda a: a[::-1, :, ::-1],
    "column": lambda a: a[:, 3, 5],
    "repeated": lambda a: np.broadcast_to(a[:, :1, :4], (6, 3, 4)),
    "one element": lambda a: a[3:4, 2:3, 1:2],
    "0-d": lambda a: a[3:4, 2:3, 1:2].reshape(()),
    "empty": lambda a: a[:0],
    "misaligned": lambda a: a.reshape(-1).view("u1")[1:-3].view("f4"),
    "misaligned and stepped": lambda a: a.reshape(-1).view("u1")[1:-3].view("f4")[::3],
}
# Those that have several elements, each of them once.
FILLED = [name for name in VIEWS if name not in {"repeated", "one element", "0-d", "empty"}]
DTYPES = list("?bBhHiIqQefdFD")


def numbers(seed: int = 0, dtype: Any = np.float32, shape: tuple[int, ...] = SHAPE) -> Any:
    """An array of random bits: NaNs with payloads, infinities, denormals and all."""
    dtype = np.dtype(dtype)
    bits = np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize)
    return np.frombuffer(bits, dtype).reshape(shape).copy()


def bytes_of(array: Any) -> bytes:
    """All bytes of a numpy array, in C order: the reference for everything here."""
    data: bytes = array.tobytes(order="C")
    return data


@dataclass(frozen=True)
class Cut:
    """A strided view to be cut out of a fresh array, and a run of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    slices: tuple[slice, ...]
    axes: tuple[int, ...]
    start: int
    nbytes: int

    def view(self, base: Any) -> Any:
        return base[(*self.slices, ...)].transpose(self.axes)


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    """Any shape, steps of either sign, any order of axes, any run of whole elements."""
    dtype = draw(st.sampled_from(["u1", "f2", "i4", "f8", "c16", "?"]))
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    step = st.sampled_from([1, 1, 2, 3, -1, -2])
    slices = []
    for extent in shape:
        lowest = draw(st.integers(0, extent))
        piece = range(extent)[lowest:][:: draw(step)]
        stop = piece.stop if piece.stop >= 0 else None
        slices.append(slice(piece.start, stop, piece.step) if piece else slice(0, 0))
    axes = tuple(draw(st.permutations(range(len(shape)))))
    cut = Cut(dtype, shape, tuple(slices), axes, 0, 0)
    elements = cut.view(np.empty(shape, dtype)).size
    first = draw(st.integers(0, elements))
    last = draw(st.integers(first, elements))
    width = np.dtype(dtype).itemsize
    return Cut(dtype, shape, tuple(slices), axes, first * width, (last - first) * width)
