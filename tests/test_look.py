"""A look at a chunk tells what each module tells by itself, with the compiled loops and without."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt.look
from gpuckpt.arena import AREAS, Slot
from gpuckpt.coding import (
    Bytes,
    Samples,
    choose_all,
    choose_by_entropy,
    choose_nothing,
    encode,
)
from gpuckpt.dtypes import is_turned, to_numpy, width_of
from gpuckpt.fingerprint import checksum, fingerprint
from gpuckpt.look import look
from gpuckpt.native import native
from gpuckpt.planes import split
from gpuckpt.statistics import statistics_of
from tests.strategies import PLAIN, SMALL

SIZES = (0, 1, 7, 100, 1023, 1024, 1025, 16_384, 16_385, 20_000, 70_001)


@st.composite
def chunks(draw):
    dtype = draw(st.sampled_from(sorted({*PLAIN, *SMALL, ">float32", ">float16"})))
    count = draw(st.sampled_from(SIZES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    raw = rng.integers(0, 256, count * to_numpy(dtype).itemsize, np.uint8)
    return dtype, raw


@pytest.mark.parametrize("loops", [True, False])
@settings(deadline=None)
@given(chunks())
def test_a_look_tells_what_each_module_tells(loops, chunk):
    dtype, raw = chunk
    width = width_of(dtype)
    with pytest.MonkeyPatch.context() as patched:
        if not loops:
            patched.setattr(gpuckpt.look, "native", lambda: None)
        seen = look(raw, dtype, width, np.empty(raw.size + 64, np.uint8))
        assert look(raw, dtype).fingerprint == seen.fingerprint == fingerprint(raw.data)
    assert seen.checksum in {checksum([raw.data]), None}
    assert (seen.checksum is not None) == (loops and native() is not None and raw.size > 240)
    wanted = statistics_of(raw, dtype)
    assert (wanted is None) == (seen.statistics is None)
    if wanted is not None and seen.statistics is not None:
        assert (wanted.nans, wanted.infs) == (seen.statistics.nans, seen.statistics.infs)
        assert math.isclose(wanted.squares, seen.statistics.squares, rel_tol=2e-6, abs_tol=1e-300)
    assert seen.planes is not None
    parts = split(raw, width, np.empty_like(raw), turned=is_turned(dtype))
    assert all(map(np.array_equal, seen.planes, parts))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-22, 1.0, 1e19, 3e38])
def test_squares_that_float32_cannot_hold_are_counted(dtype, scale):
    raw = np.full(70_000, scale, to_numpy(dtype))
    seen = look(raw.view(np.uint8), dtype).statistics
    assert seen is not None
    assert seen.squares == pytest.approx(70_000 * float(raw[0]) ** 2, rel=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_signalling_nan_is_counted_and_nobody_is_warned(dtype):
    code = {"float32": 0x7FA00000, "bfloat16": 0x7FA0, "float16": 0x7D00}[dtype]
    raw = np.full(5000, code, f"<u{to_numpy(dtype).itemsize}").view(np.uint8)
    with warnings.catch_warnings(action="error"):
        seen = look(raw, dtype).statistics
    assert seen is not None
    assert seen.nans == 5000


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_samples_are_runs_at_even_distances_of_each_plane(width):
    elements = np.arange(1 << 18, dtype=f"<u{width}")
    found = Samples(elements.view(np.uint8), width)
    assert len(found) == width
    low = found[0]
    assert 4096 <= low.size <= 8192
    run = 64 // width
    assert (np.diff(low.reshape(-1, run).astype(int), axis=1) % 256 == 1).all()
    few = elements[:100].view(np.uint8)
    parts = split(few, width, np.empty_like(few), turned=width > 1)
    assert all(map(np.array_equal, Samples(few, width, turned=width > 1), parts))


@given(
    count=st.one_of(st.integers(1, 300), st.integers(4000, 40_000)),
    width=st.sampled_from([2, 4, 8]),
    turned=st.booleans(),
)
def test_planes_are_sampled_where_the_chunk_as_it_is_would_be(count, width, turned):
    """So that what a GPU has split is encoded as what the host splits."""
    raw = np.random.default_rng(count).integers(0, 256, count * width, np.uint8)
    slot, seen = Slot(*np.empty((AREAS, raw.size), np.uint8)), []

    def choose(planes: Sequence[Bytes], _: int) -> Sequence[bool]:
        seen.append([plane.tobytes() for plane in planes])
        return [False] * width

    encode([raw], width, slot, choose, turned=turned)
    encode(split(raw, width, slot.planes, turned=turned), width, slot, choose, turned=turned)
    assert seen[0] == seen[1]


def test_nothing_is_sampled_where_nobody_looks():
    raw = np.zeros(7, np.uint8)  # no whole number of elements: a look would fail
    assert choose_nothing(Samples(raw, 4), raw.size) == [False] * 4
    assert choose_all(Samples(raw, 4), raw.size) == [True] * 4
    assert choose_by_entropy(Samples(raw, 4), raw.size) == [False] * 4
