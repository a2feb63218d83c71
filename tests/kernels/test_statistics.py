"""What `filter_chunks` says of elements: NaNs, infinities, squares; against float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuckpt.layout import LEAF_NBYTES
from gpuckpt.statistics import byte_values, statistics_of
from tests.cuda_on_cpu.emulator import cuemu
from tests.kernels.building import library
from tests.kernels.memory import TOLERANCE, Launch, Piece

TYPES = {
    "float16": (1, np.uint16),
    "bfloat16": (2, np.uint16),
    "float32": (3, np.uint32),
    "float64": (4, np.uint64),
    "float8_e4m3fn": (5, np.uint8),
    "float8_e5m2": (5, np.uint8),
    "float8_e8m0fnu": (5, np.uint8),
}
# Exponents' bits, below the sign: what makes an element not finite, large, small, subnormal.
EXPONENT = {1: 0x7C00, 2: 0x7F80, 3: 0x7F800000, 4: 0x7FF << 52, 5: 0x78}

each_type = pytest.mark.parametrize("dtype", TYPES)


@pytest.fixture(scope="module")
def fast() -> cuemu.Lib:
    return library("filter")


@pytest.fixture(scope="module")
def checked() -> cuemu.Lib:
    return library("filter", check=True)


def launch_of(dtype: str, elements: np.ndarray, misaligned: int = 0) -> Launch:
    kind, bits = TYPES[dtype]
    raw = elements.astype(bits).view(np.uint8)
    piece = Piece(raw.size, np.dtype(bits).itemsize, misaligned, kind=kind)
    return Launch([piece], contents=[raw], values=byte_values(dtype))


def scaled(dtype: str, count: int, exponent: int, seed: int = 0) -> np.ndarray:
    """Bits of normally distributed elements times a power of two."""
    kind, bits = TYPES[dtype]
    rng = np.random.default_rng(seed)
    if kind == 5:
        return rng.integers(0, 0x60, count)
    numbers = rng.standard_normal(count) * 2.0**exponent
    if kind == 2:
        return numbers.astype(np.float32).view(np.uint32) >> 16
    return numbers.astype({1: np.float16, 3: np.float32, 4: np.float64}[kind]).view(bits)


@each_type
def test_every_sort_of_element_is_counted(fast, dtype):
    """Random bits have all of them; and it is what the host counts."""
    kind, bits = TYPES[dtype]
    rng = np.random.default_rng(0)
    elements = rng.integers(0, 2 ** (8 * np.dtype(bits).itemsize), 40000, dtype=np.uint64)
    launch = launch_of(dtype, elements, 3)
    launch.filter(fast)
    found, host = launch.summaries(0), statistics_of(launch.raw[0], dtype)
    assert host is not None
    assert (found["nans"].sum(), found["infs"].sum()) == (host.nans, host.infs)
    assert found["squares"].sum() == pytest.approx(host.squares, rel=2 * TOLERANCE)
    assert kind == 4 or host.nans


@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [
        *(
            (dtype, e)
            for dtype in ("bfloat16", "float32")
            for e in (-128, -70, -50, 0, 50, 63, 126)
        ),
        *(("float16", e) for e in (-24, -14, 0, 13)),
        *(("float64", e) for e in (-500, -100, 0, 100, 500)),
    ],
)
def test_huge_and_tiny_elements_are_summed_as_float64_sums_them(fast, dtype, exponent):
    launch = launch_of(dtype, scaled(dtype, 5000, exponent))
    launch.filter(fast)
    assert (launch.summaries(0)["squares"] > 0).all()


def test_a_sum_that_float64_cant_hold_is_infinite(fast):
    launch = launch_of("float64", scaled("float64", 100, 900))
    launch.filter(fast)
    assert launch.summaries(0)["squares"].tolist() == [np.inf]


@each_type
def test_each_place_of_a_tile_is_counted(fast, dtype):
    """One NaN and one infinity wander over a tile of ones, and a full one follows."""
    kind, bits = TYPES[dtype]
    width = np.dtype(bits).itemsize
    ones = {1: 0x3C00, 2: 0x3F80, 3: 0x3F800000, 4: 0x3FF << 52, 5: 0x38}[kind]
    count = 2048 // width
    inf, nan = (EXPONENT[kind], EXPONENT[kind] + 1) if kind != 5 else (0x7C, 0x7F)
    for at in range(0, count, max(count // 37, 1)):
        elements = np.full(2 * count + 3, ones, np.uint64)
        elements[at], elements[(at * 7 + 1) % count] = inf, nan
        launch_of(dtype, elements).filter(fast)


@each_type
def test_what_isnt_finite_and_what_is_tiny_lie_side_by_side(fast, dtype):
    kind, _ = TYPES[dtype]
    elements = scaled(dtype, 3000, 0).astype(np.uint64)
    elements[::5] = 0
    elements[::7] = EXPONENT[kind]
    elements[::11] = EXPONENT[kind] | 1
    elements[::13] = 1
    launch_of(dtype, elements).filter(fast)


def test_zeros_of_either_sign_add_nothing(fast):
    launch = launch_of("float32", np.array([0, 1 << 31] * 3000, np.uint64))
    launch.filter(fast)
    assert launch.summaries(0)["squares"].tolist() == [0.0]


def test_what_follows_the_last_element_isnt_counted_by_its_worth(fast):
    """Byte 0 of this type is 2**-127, but where a tile ends early there are no bytes at all."""
    launch = launch_of("float8_e8m0fnu", np.zeros(17, np.uint64))
    launch.filter(fast)
    assert launch.summaries(0)["squares"].tolist() == [17 * 2.0**-254]


def test_all_that_can_be_counted_fits_its_place(fast):
    """A leaf of nothing but NaNs, and of nothing but set bytes."""
    launch = launch_of("float8_e5m2", np.full(2 * LEAF_NBYTES, 0x7F, np.uint64))
    launch.filter(fast)
    assert launch.summaries(0)["nans"].tolist() == [LEAF_NBYTES] * 2
    launch_of("float8_e5m2", np.full(2 * LEAF_NBYTES, 0xFC, np.uint64)).filter(fast)


@settings(max_examples=60, deadline=None)
@given(
    order=st.integers(0, 9),
    grid=st.integers(1, 6),
    dtype=st.sampled_from(sorted(TYPES)),
    exponent=st.integers(-12, 12),
)
def test_the_sum_is_the_same_in_every_order_of_threads_and_blocks(
    fast, order, grid, dtype, exponent
):
    launch = launch_of(dtype, scaled(dtype, 100_000, exponent))
    fast.set(order=0, block_order=0)
    launch.filter(fast)
    once = launch.staged.copy()
    fast.set(order=order, block_order=order % 2)
    launch.filter(fast, grid)
    assert np.array_equal(launch.staged, once)


@each_type
def test_counting_has_no_race_and_reads_nothing_else(checked, dtype):
    kind, _ = TYPES[dtype]
    elements = scaled(dtype, 8000, 0).astype(np.uint64)
    elements[3000::37] = EXPONENT[kind]
    for misaligned in (0, 5):
        launch_of(dtype, elements, misaligned).filter(checked, 1)
