"""Runs of strided tensors, packed and put back by the emulated kernels, against numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuckpt.arrays import strided as reference
from gpuckpt.devices.strided import AXES_MAX, RUN, Run, lay_out_runs, merged
from tests.cuda_on_cpu.emulator import cuemu
from tests.kernels.building import library
from tests.kernels.memory import FILL, aligned, untouched_around
from tests.often import often

NAMES = ("gather", "scatter")


@pytest.fixture(scope="module")
def fast() -> dict[str, cuemu.Lib]:
    return {name: library(name) for name in NAMES}


@pytest.fixture(scope="module")
def checked() -> dict[str, cuemu.Lib]:
    return {name: library(name, check=True) for name in NAMES}


@dataclass
class Strided:
    """A tensor in memory, of random bytes, and one run of its bytes with room for them packed.

    `order` says which axis lies outermost, next, …; `gaps` how many elements'
    room is left after each axis, `flipped` which ones go backwards.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    gaps: tuple[int, ...]
    flipped: tuple[bool, ...]
    itemsize: int
    off: int = 0
    packed_off: int = 0
    first: int = 0
    count: int | None = None
    seed: int = 0
    array: Any = field(init=False)

    def __post_init__(self) -> None:
        strides, step, begin = [0] * len(self.shape), self.itemsize, 0
        for axis in reversed(self.order):
            strides[axis] = -step if self.flipped[axis] else step
            begin += step * (self.shape[axis] - 1) if self.flipped[axis] else 0
            step *= self.shape[axis] + self.gaps[axis]
        self.memory = aligned(max(step, self.itemsize), self.off)
        self.memory[:] = np.random.default_rng(self.seed).integers(0, 256, self.memory.size)
        dtype = np.dtype((np.void, self.itemsize))
        self.array = np.ndarray(self.shape, dtype, self.memory, begin, tuple(strides))
        rest = math.prod(self.shape) - self.first
        nbytes = (rest if self.count is None else min(self.count, rest)) * self.itemsize
        self.packed = aligned(nbytes, self.packed_off)
        self.start = self.first * self.itemsize

    def run(self) -> Run:
        start = self.array.__array_interface__["data"][0]
        places = (start, self.shape, self.array.strides, self.itemsize)
        return Run(*places, self.packed.ctypes.data, self.start, self.packed.size)


def launch(
    libraries: dict[str, cuemu.Lib], name: str, tensors: list[Strided], grid: int | None = None
) -> None:
    """Pack or put back the tensors' runs; a checked library lets the kernel touch no more."""
    runs = lay_out_runs([tensor.run() for tensor in tensors])
    table = aligned(runs.rows.nbytes)
    table[:] = runs.rows.view(np.uint8)
    used = libraries[name]
    if hasattr(used.dll, "cuemu_regions"):
        packed = [tensor.packed for tensor in tensors if tensor.packed.size]
        memory = [tensor.memory for tensor in tensors]
        ours, theirs = (packed, memory) if name == "gather" else (memory, packed)
        used.regions(*ours, readonly=[table, *theirs])
    arguments = [table, runs.rows.size, runs.pieces]
    used.launch(f"{name}_runs", grid or max(runs.pieces, 1), 256, arguments)
    for tensor in tensors:
        assert untouched_around(tensor.packed)
        assert untouched_around(tensor.memory)


def check(libraries: dict[str, cuemu.Lib], tensors: list[Strided], grid: int | None = None) -> None:
    """Gather, and scatter something else; compare every byte."""
    before = [tensor.memory.copy() for tensor in tensors]
    launch(libraries, "gather", tensors, grid)
    for tensor, memory in zip(tensors, before, strict=True):
        wanted = np.empty_like(tensor.packed)
        reference.gather(tensor.array, tensor.start, wanted)
        assert np.array_equal(tensor.packed, wanted), tensor
        assert np.array_equal(tensor.memory, memory)
        tensor.packed[:] = ~wanted
        reference.scatter(tensor.packed, tensor.array, tensor.start)
        wanted = tensor.memory.copy()
        tensor.memory[:] = memory
        memory[:] = wanted
    launch(libraries, "scatter", tensors, grid)
    for tensor, memory in zip(tensors, before, strict=True):
        assert np.array_equal(tensor.memory, memory), tensor


@st.composite
def tensors(draw: st.DrawFn) -> Strided:
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=5)))
    if draw(st.booleans()):
        shape = (*shape[:2], draw(st.integers(1, 900)))
    axes = len(shape)
    itemsize = draw(st.sampled_from([1, 2, 3, 4, 8, 16, 20]))
    count = math.prod(shape)
    first = draw(st.integers(0, count - 1))
    return Strided(
        shape,
        tuple(draw(st.permutations(range(axes)))),
        tuple(draw(st.lists(st.sampled_from([0, 0, 1, 3]), min_size=axes, max_size=axes))),
        tuple(draw(st.lists(st.booleans(), min_size=axes, max_size=axes))),
        itemsize,
        draw(st.sampled_from([0, 0, itemsize % 16, 1, 4, 8])),
        draw(st.sampled_from([0, 0, 0, 8, 3])),
        first,
        draw(st.one_of(st.none(), st.integers(0, count))),
        draw(st.integers(0, 99)),
    )


@settings(max_examples=often(200), deadline=None)
@given(many=st.lists(tensors(), min_size=1, max_size=5), grid=st.integers(0, 4))
def test_any_runs_are_packed_and_put_back(fast, many, grid):
    check(fast, many, grid)


def plain(shape: tuple[int, ...], order: tuple[int, ...], itemsize: int, **more: Any) -> Strided:
    axes = len(shape)
    return Strided(shape, order, (0,) * axes, (False,) * axes, itemsize, **more)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
def test_matrices_transposed_sliced_and_backwards(fast, itemsize):
    """Several pieces of 16 KiB each, and runs that begin and end anywhere."""
    check(
        fast,
        [
            plain((300, 77), (1, 0), itemsize),
            plain((300, 77), (1, 0), itemsize, first=1234, count=17001),
            Strided((90, 200), (0, 1), (0, 8), (False, False), itemsize),
            Strided((90, 200), (0, 1), (0, 8), (True, True), itemsize, first=5),
            plain((5, 7, 11, 13), (3, 1, 2, 0), itemsize, off=1),
            plain((), (), itemsize),
            plain((3, 5000), (1, 0), itemsize),
        ],
    )


def test_a_broadcast_tensor_is_packed(fast):
    row = plain((500,), (0,), 4)
    wanted = np.broadcast_to(row.array, (40, 500))
    packed = aligned(wanted.nbytes)
    run = Run(row.memory.ctypes.data, (40, 500), (0, 4), 4, packed.ctypes.data, 0, packed.size)
    runs = lay_out_runs([run])
    fast["gather"].launch("gather_runs", 2, 256, [runs.rows, 1, runs.pieces])
    assert packed.tobytes() == wanted.tobytes()


def test_an_index_beyond_32_bits_is_found(fast):
    """Nobody has the memory for the tensor; but all its elements may lie at one place."""
    one = aligned(8)
    one[:] = range(8)
    packed = aligned(64)
    shape = (3, 2**31 + 1, 5)
    start = (math.prod(shape) - 8) * 8
    run = Run(one.ctypes.data, shape, (0, 0, 0), 8, packed.ctypes.data, start, 64)
    runs = lay_out_runs([run])
    assert runs.rows["start"][0] >= 2**32
    fast["gather"].launch("gather_runs", 1, 256, [runs.rows, 1, runs.pieces])
    assert packed.tolist() == [*range(8)] * 8


def test_many_runs_find_their_rows(fast):
    check(fast, [plain((at % 7 + 1, 3), (1, 0), 4, seed=at) for at in range(300)])


@pytest.mark.parametrize("grid", [1, None])
def test_no_race_and_nothing_else_is_touched(checked, grid):
    shapes = [plain((40, 70), (1, 0), size, off=size) for size in (1, 2, 4, 8, 16)]
    odd = [Strided((9, 33), (0, 1), (2, 3), (True, False), 4, 2, 8, 7, 201)]
    check(checked, [*shapes, *odd, plain((77, 3), (1, 0), 2, packed_off=6)], grid)


# The table


def axes_of(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> int:
    run = Run(1 << 20, shape, strides, itemsize, 1 << 21, 0, math.prod(shape) * itemsize)
    return int(lay_out_runs([run]).rows["axes"][0])


def test_axes_that_lie_dense_become_one():
    assert merged((4, 5, 6), (120, 24, 4), 4) == ((480, 1),)
    assert merged((4, 5, 6), (24, 96, 4), 4) == ((4, 24), (5, 96), (24, 1))
    assert merged((1, 5, 1, 6), (7, 48, 9, 8), 4) == ((30, 8), (4, 1))
    assert axes_of((4, 5, 6), (120, 24, 4), 4) == 1
    assert axes_of((64, 64), (4, 256), 4) == 2
    assert axes_of((8, 3, 224, 224), (4, 32, 96, 96 * 224), 4) == 4


def test_items_are_as_large_as_addresses_and_strides_allow():
    def size(shape: tuple[int, ...], strides: tuple[int, ...], tensor: int, itemsize: int) -> int:
        nbytes = math.prod(shape) * itemsize
        row = lay_out_runs([Run(tensor, shape, strides, itemsize, 1 << 21, 0, nbytes)]).rows[0]
        assert row["count"] * row["itemsize"] == nbytes
        return int(row["itemsize"])

    assert size((10, 64), (512, 4), 1 << 20, 4) == 16
    assert size((10, 64), (260, 4), 1 << 20, 4) == 4
    assert size((10, 64), (4, 40), 1 << 20, 4) == 4
    assert size((10, 64), (8, 80), (1 << 20) + 2, 8) == 2
    assert size((10, 64), (5, 50), 1 << 20, 5) == 1


def test_pieces_are_counted_over_all_rows():
    sizes = (0, 16384, 16388, 4)
    runs = lay_out_runs([Run(64, (5000,), (8,), 4, 64, 0, nbytes) for nbytes in sizes])
    assert runs.rows["first_piece"].tolist() == [0, 0, 1, 3]
    assert runs.pieces == 4
    assert lay_out_runs([]).pieces == 0


def test_a_run_that_cuts_an_element_or_has_too_many_axes_is_refused():
    with pytest.raises(AssertionError, match="cut"):
        lay_out_runs([Run(0, (4,), (8,), 4, 0, 2, 4)])
    with pytest.raises(AssertionError):
        lay_out_runs([Run(0, (4,), (8,), 4, 0, 8, 12)])
    shape = (2,) * (AXES_MAX + 1)
    with pytest.raises(AssertionError):
        lay_out_runs([Run(0, shape, tuple(3 * 5**k for k in range(len(shape))), 1, 0, 0, 16)])


def test_a_row_is_as_the_kernels_read_it():
    assert RUN.itemsize == 560
    assert FILL != 0
