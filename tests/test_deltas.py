"""Deltas and sparse planes: what they are by their definitions, and back to the same bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuckpt.deltas import WIDTHS, delta, delta_split, join_undelta, undelta
from gpuckpt.planes import split
from gpuckpt.sparse import bitmap_nbytes, count_nonzero, pack_sparse, unpack_sparse

COUNTS = (0, 1, 2, 7, 8, 9, 63, 64, 65, 100, 1000, 70_001)
SHARES = (0.0, 0.001, 0.05, 0.5, 1.0)


def placed(raw: Any, offset: int) -> Any:
    """The same bytes, at another alignment."""
    room = np.empty(raw.size + offset, np.uint8)
    room[offset:] = raw
    return room[offset:]


@st.composite
def pairs(draw):
    """Elements of some width and a base that is near, far, or has other bits altogether."""
    width, count = draw(st.sampled_from(WIDTHS)), draw(st.sampled_from(COUNTS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    base = rng.integers(0, 256, count * width, np.uint8)
    cur = rng.integers(0, 256, count * width, np.uint8)
    if draw(st.booleans()):
        near = rng.integers(0, 7, count).astype(f"<u{width}") - np.array(3, f"<u{width}")
        cur = (base.view(f"<u{width}") + near).view(np.uint8)
    offsets = [draw(st.integers(0, 9)) for _ in range(3)]
    out = np.empty(count * width + offsets[2], np.uint8)[offsets[2] :]
    return placed(cur, offsets[0]), placed(base, offsets[1]), width, out


@pytest.mark.parametrize("width", WIDTHS)
def test_small_differences_of_either_sign_are_small_numbers(width):
    base = np.array([0, 0, 0, 0, 5, 2 ** (8 * width) - 1, 0], f"<u{width}")
    cur = np.array([0, -1, 1, -2, 8, 0, 2 ** (8 * width - 1)], object) % 2 ** (8 * width)
    out = np.empty(base.nbytes, np.uint8)
    delta(cur.astype(f"<u{width}").view(np.uint8), base.view(np.uint8), width, out)
    assert out.view(f"<u{width}").tolist() == [0, 1, 2, 3, 6, 2, 2 ** (8 * width) - 1]


@settings(deadline=None)
@given(pairs())
def test_a_delta_is_undone_in_place_or_elsewhere(pair):
    cur, base, width, out = pair
    delta(cur, base, width, out)
    whole = np.empty_like(cur)
    undelta(out, base, width, whole)
    assert np.array_equal(whole, cur)
    in_place = out.copy()
    undelta(in_place, base, width, in_place)
    assert np.array_equal(in_place, cur)
    undelta(out, base, width, base)
    assert np.array_equal(base, cur)


@settings(deadline=None)
@given(pairs())
def test_split_deltas_are_the_planes_of_deltas_and_are_joined_again(pair):
    cur, base, width, out = pair
    planes = delta_split(cur, base, width, out)
    folded = np.empty_like(cur)
    delta(cur, base, width, folded)
    assert np.array_equal(out, np.concatenate(split(folded, width, np.empty_like(folded))))
    assert all(plane.base is not None and plane.size * width == cur.size for plane in planes)
    join_undelta(planes, base, width, folded)
    assert np.array_equal(folded, cur)
    join_undelta(planes, base, width, base)
    assert np.array_equal(base, cur)


@st.composite
def sparse_planes(draw):
    count = draw(st.sampled_from(COUNTS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    plane = rng.integers(1, 256, count).astype(np.uint8)
    plane[rng.random(count) >= draw(st.sampled_from(SHARES))] = 0
    return placed(plane, draw(st.integers(0, 9)))


@settings(deadline=None)
@given(sparse_planes(), st.integers(0, 9), st.booleans())
def test_a_sparse_plane_is_what_numpy_says_and_comes_back(plane, offset, tight):
    wanted = plane[plane != 0]
    packed = placed(np.full(wanted.size if tight else plane.size, 9, np.uint8), offset)
    bitmap = placed(np.full(bitmap_nbytes(plane.size), 255, np.uint8), offset)
    assert pack_sparse(plane, bitmap, packed) == count_nonzero(plane) == wanted.size
    assert np.array_equal(bitmap, np.packbits(plane != 0, bitorder="little"))
    assert np.array_equal(packed[: wanted.size], wanted)
    out = placed(np.full(plane.size, 7, np.uint8), offset)
    assert unpack_sparse(bitmap, packed[: wanted.size], out)
    assert np.array_equal(out, plane)


@settings(deadline=None)
@given(sparse_planes(), st.data())
def test_a_bitmap_and_bytes_that_do_not_fit_are_refused(plane, data):
    wanted, bitmap = plane[plane != 0], np.packbits(plane != 0, bitorder="little")
    around = np.full(plane.size + 128, 7, np.uint8)
    out = around[64 : 64 + plane.size]
    assert not unpack_sparse(bitmap, np.append(wanted, np.uint8(1)), out)
    assert not unpack_sparse(np.append(bitmap, np.uint8(0)), wanted, out)
    if wanted.size:
        assert not unpack_sparse(bitmap, wanted[1:], out)
    if plane.size:
        at = data.draw(st.integers(0, 8 * bitmap.size - 1))
        bitmap[at // 8] ^= 1 << at % 8
        assert not unpack_sparse(bitmap, wanted, out)
    assert (around[:64] == 7).all()
    assert (around[64 + plane.size :] == 7).all()


def test_a_bit_behind_the_planes_end_is_refused_even_if_the_number_fits():
    bitmap = np.array([0b1000_0000], np.uint8)
    assert not unpack_sparse(bitmap, np.ones(1, np.uint8), np.empty(7, np.uint8))
    assert unpack_sparse(bitmap, np.ones(1, np.uint8), np.empty(8, np.uint8))
