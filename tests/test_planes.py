"""Chunks are split into planes, and joined again; of floats, elements are turned before."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuckpt.dtypes import is_turned, width_of
from gpuckpt.native import VARIABLE, WIDTHS, native
from gpuckpt.planes import join, split
from gpuckpt.spec import Spec

Bytes = npt.NDArray[np.uint8]


@pytest.fixture(params=["loops", "numpy"])
def _by(request, monkeypatch):
    """Who splits: the compiled loops, if they are there, or numpy."""
    if request.param == "numpy":
        monkeypatch.setenv(VARIABLE, "0")
    native.cache_clear()
    yield
    native.cache_clear()


def spread(data: Bytes, step: int) -> Bytes:
    """The same bytes, `step` from one to the next."""
    around = np.full(data.size * step, 0xA5, np.uint8)
    around[::step] = data
    return around[::step]


@st.composite
def chunks(draw: st.DrawFn) -> tuple[int, Bytes]:
    width = draw(st.sampled_from(WIDTHS))
    count = draw(st.integers(0, 40) | st.sampled_from((4095, 8191, 16_385, 40_001)))
    seed = draw(st.integers(0, 2**32 - 1))
    return width, np.random.default_rng(seed).integers(0, 256, width * count, np.uint8)


def turned_by_hand(raw: Bytes, width: int) -> Bytes:
    """Each element turned left by one bit: as a row of bits, the highest first."""
    bits = np.unpackbits(raw.reshape(-1, width)[:, ::-1], axis=1)
    return np.packbits(np.roll(bits, -1, axis=1), axis=1)[:, ::-1].reshape(-1)


@pytest.mark.usefixtures("_by")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chunks(), st.booleans(), st.integers(1, 3), st.integers(1, 3))
def test_any_chunk_is_split_and_joined_again_turned_or_not_wherever_it_lies(
    chunk, turned, raw_step, plane_step
):
    width, raw = chunk
    turned &= width > 1
    planes = split(spread(raw, raw_step), width, np.empty(raw.size + 7, np.uint8), turned=turned)
    wanted = turned_by_hand(raw, width) if turned else raw
    assert len(planes) == width
    assert all(np.array_equal(plane, wanted[k::width]) for k, plane in enumerate(planes))
    out = spread(np.zeros_like(raw), raw_step)
    join([spread(plane, plane_step) for plane in planes], out, turned=turned)
    assert np.array_equal(out, raw)
    assert out.base is None or (np.delete(out.base, np.s_[::raw_step]) == 0xA5).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_last_plane_of_turned_floats_is_their_exponent(dtype):
    kind: Any = np.dtype(getattr(ml_dtypes, dtype, dtype))
    numbers = np.array([1, -1, 1.5, -0.25, 0, -0.0, np.inf, -np.inf, 2**-126], kind)
    raw = numbers.view(np.uint8)
    planes = split(raw, kind.itemsize, np.empty_like(raw), turned=True)
    assert planes[-1].tolist() == [127, 127, 127, 125, 0, 0, 255, 255, 1]
    assert (planes[0] & 1).tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]  # the signs


def test_only_floats_with_exponents_of_eight_bits_are_turned_and_only_as_machines_have_them():
    turned = {"float32", "bfloat16", "complex64"}
    others = {"float16", "float64", "complex128", "int32", "float8_e5m2", "U3", "V4"}
    assert all(map(is_turned, turned))
    assert not any(map(is_turned, others | {f">{name}" for name in turned}))
    assert all(width_of(name) > 1 for name in turned)
    assert Spec("w", "bfloat16", (3,)).turned
    assert not Spec("w", ">float32", (3,)).turned


def test_bytes_are_not_turned():
    loops = native()
    if loops is not None:
        with pytest.raises(AssertionError, match="byte"):
            loops.split(np.zeros(9, np.uint8), 1, np.zeros(9, np.uint8), turned=True)
