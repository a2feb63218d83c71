"""The kernels of deltas, run on the CPU by the emulator: the host's deltas and sparse planes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuckpt.deltacoding import delta_pays, histograms_pay
from gpuckpt.devices import kernels
from gpuckpt.devices.pairs import PAIR, PIECE, SEGMENT
from tests.cuda_on_cpu.emulator import cuemu
from tests.kernels.building import library
from tests.kernels.copies import Copies, Copy
from tests.often import often

NAMES = ("survey", "sample", "pack")
TURNED = (2, 4)
WAYS = [*((width, False) for width in kernels.WIDTHS), *((width, True) for width in TURNED)]
EDGES = (4, 8, 32, 128, 512, SEGMENT, 2 * SEGMENT, PIECE, PIECE + SEGMENT)


@pytest.fixture(scope="module")
def fast() -> dict[str, cuemu.Lib]:
    return {name: library(name) for name in NAMES}


@pytest.fixture(scope="module")
def checked() -> dict[str, cuemu.Lib]:
    return {name: library(name, check=True) for name in NAMES}


@st.composite
def copies(draw: st.DrawFn) -> Copy:
    near = st.tuples(st.sampled_from(EDGES), st.integers(-9, 9)).map(sum)
    count = draw(st.one_of(st.integers(1, 40), near.map(lambda n: max(n, 1))))
    width = draw(st.sampled_from(kernels.WIDTHS))
    changed = draw(st.sampled_from([0, 0.01, 0.2, 1]))
    turned = width in TURNED and draw(st.booleans())
    return Copy(count, width, changed, by=draw(st.sampled_from([1, 100])), turned=turned)


@settings(max_examples=often(100), deadline=None)
@given(
    chunks=st.lists(copies(), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
    order=st.integers(0, 5),
    grid=st.one_of(st.none(), st.integers(1, 5)),
)
def test_any_table_of_copies_is_counted_sampled_and_packed(fast, chunks, seed, order, grid):
    launch = Copies(chunks, seed)
    for kernel in fast.values():
        kernel.set(order=order, block_order=order % 2)
    launch.survey_counts(fast["survey"], grid)
    launch.sample(fast["sample"], grid)
    launch.pack(fast["pack"], grid)


@pytest.mark.parametrize(("width", "turned"), WAYS)
def test_every_difference_of_the_least_and_the_greatest_elements_is_the_hosts(fast, width, turned):
    half = 2 ** (8 * width - 1)
    edges = np.array([0, 1, 2, half - 1, half, half + 1, 2 * half - 1], np.dtype(f"<u{width}"))
    raw, base = (axis.ravel().view(np.uint8) for axis in np.meshgrid(edges, edges))
    launch = Copies([Copy(raw.size // width, width, turned=turned)])
    launch.place([raw], [base])
    launch.survey_counts(fast["survey"])
    launch.sample(fast["sample"])
    launch.pack(fast["pack"])


@settings(max_examples=30, deadline=None)
@given(copies(), st.integers(0, 99))
def test_the_decision_is_the_hosts(fast, chunk, seed):
    launch = Copies([chunk], seed)
    launch.sample(fast["sample"])
    found = histograms_pay(launch.survey.histograms(launch.results, 0))
    assert found == delta_pays(launch.raw[0], launch.before[0], chunk.width)


SMALL = [
    *(Copy(SEGMENT + 131, width, changed) for width in kernels.WIDTHS for changed in (0.05, 1)),
    Copy(PIECE + 7, 1, 0.1),
    Copy(1, 8, 1),
    Copy(600, 2, 0),
    Copy(SEGMENT + 131, 2, 0.2, by=1000),
    Copy(SEGMENT + 130, 4, 0.2, by=10**6),
    Copy(700, 8, 1, by=10**18),
    *(Copy(SEGMENT + 131, width, 0.2, by=1000, turned=True) for width in TURNED),
]


@pytest.mark.parametrize("chunks", [SMALL, SMALL[2:3]], ids=["many", "one"])
@pytest.mark.parametrize("grid", [1, None])
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_of_deltas_has_no_race_and_touches_nothing_else(checked, name, grid, chunks):
    launch = Copies(chunks)
    {"survey": launch.survey_counts, "sample": launch.sample, "pack": launch.pack}[name](
        checked[name], grid
    )


def test_the_rows_are_as_the_kernels_read_them():
    assert PAIR.itemsize == 144
    assert PAIR.fields is not None
    assert [PAIR.fields[name][1] for name in ("found", "width", "out", "sparse", "turned")] == [
        *(40, 56, 64, 128, 136)
    ]
