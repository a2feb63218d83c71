"""Differences of chunks, encoded and decoded again, and what a stranger may make of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.arena import AREAS, Slot
from gpuckpt.coding import choose_all, encode
from gpuckpt.deltacoding import decode_delta, delta_pays, encode_delta
from gpuckpt.deltas import delta
from gpuckpt.plan import area_nbytes
from gpuckpt.spec import Plane

Bytes = npt.NDArray[np.uint8]


def new_slot(nbytes: int) -> Slot:
    return Slot(*np.full((AREAS, area_nbytes(max(nbytes, 8))), 0xA5, np.uint8))


def pair(seed: int, count: int, width: int, share: float, size: float) -> tuple[Bytes, Bytes]:
    """A base, and a chunk of which such a share of the elements differ by about so much."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(f"<u{width}")
    base = rng.integers(0, 256, count * width).astype(np.uint8)
    steps = np.rint(rng.standard_normal(count) * size).astype(np.int64).astype(kind)
    raw = base.view(kind) + steps * (rng.random(count) < share).astype(kind)
    return raw.view(np.uint8), base


def encoded(raw: Bytes, base: Bytes, width: int) -> tuple[tuple[Plane, ...], Bytes]:
    slot = new_slot(raw.size)
    made = encode_delta(raw, base, width, slot.part(0, raw.size), new_slot(raw.size))
    data = b"".join(bytes(part) for part in made.parts)
    assert sum(plane.length for plane in made.planes) == len(data) <= raw.size
    return made.planes, np.frombuffer(data, np.uint8)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 3000),
    st.sampled_from((1, 2, 4, 8)),
    st.sampled_from((0.0, 0.01, 0.2, 1.0)),
    st.sampled_from((0.7, 30.0, 1e6)),
    st.booleans(),
)
def test_what_a_chunk_differs_by_leads_back_to_it(  # noqa: PLR0917
    seed, count, width, share, size, in_place
):
    raw, base = pair(seed, count, width, share, size)
    planes, coded = encoded(raw, base, width)
    out = base.copy() if in_place else np.empty_like(raw)
    decode_delta(
        coded, planes, new_slot(raw.size), out, base=out if in_place else base, where="here"
    )
    assert out.tobytes() == raw.tobytes()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3000), st.sampled_from((1, 2, 4, 8)))
def test_planes_that_were_packed_are_decoded_without_a_base_too(seed, count, width):
    raw, base = pair(seed, count, width, 0.05, 30)
    planes, coded = encoded(raw, base, width)
    out, folded = np.empty_like(raw), np.empty_like(raw)
    decode_delta(coded, planes, new_slot(raw.size), out, base=None, where="here")
    delta(raw, base, width, folded)
    assert out.tobytes() == folded.tobytes()


def test_a_plane_that_is_mostly_zero_takes_less_than_a_bit_for_each_byte():
    raw, base = pair(1, 1 << 18, 2, 0.1, 1)
    planes, coded = encoded(raw, base, 2)
    whole = encode([raw], 2, new_slot(raw.size), choose_all)
    assert [plane.codec for plane in planes] == ["sparse", "sparse"]
    assert coded.size < 0.6 * (raw.size / 2) / 8
    assert coded.size * 10 < sum(len(part) for part in whole.parts)


@pytest.mark.parametrize("share", [0.3, 0.4, 0.55])
def test_a_plane_half_of_which_is_zero_takes_hardly_more_than_its_entropy(share):
    raw, base = pair(1, 1 << 20, 1, share, 8)
    planes, coded = encoded(raw, base, 1)
    counts = np.bincount(delta_of(raw, base), minlength=256)
    bound = counts[counts > 0] @ np.log2(raw.size / counts[counts > 0]) / 8
    assert [plane.codec for plane in planes] == ["sparse"]
    assert coded.size < 1.03 * bound


def delta_of(raw: Bytes, base: Bytes) -> Bytes:
    folded = np.empty_like(raw)
    delta(raw, base, 1, folded)
    return folded


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_a_delta_pays_if_little_has_changed(width):
    raw, base = pair(1, 1 << 16, width, 0.1, 1)
    pays, share = delta_pays(raw, base, width)
    assert pays
    assert share == pytest.approx(0.6 / (8 * width), rel=0.4)
    other, _ = pair(2, 1 << 16, width, 0.1, 1)
    assert not delta_pays(other, base, width)[0]


def refused(coded: Bytes, planes: tuple[Plane, ...], nbytes: int) -> None:
    spare = new_slot(nbytes)
    held = np.zeros(nbytes + 64, np.uint8)
    with pytest.raises(gpuckpt.CorruptError, match="here"):
        decode_delta(coded, planes, spare, held[:nbytes], base=held[:nbytes], where="here")
    assert not held[nbytes:].any()


def test_damaged_bytes_are_refused():
    raw, base = pair(1, 5000, 2, 0.1, 1)
    planes, coded = encoded(raw, base, 2)
    (bitmap, packed) = planes[0].parts
    assert (planes[0].codec, bitmap.codec, packed.codec) == ("sparse", "zstd", "zstd")
    for at in (0, bitmap.length):
        wrong = coded.copy()
        wrong[at : at + 4] = 0
        refused(wrong, planes, raw.size)


def test_a_bitmap_that_does_not_fit_its_bytes_is_refused():
    nbytes = 1000
    bitmap, packed = np.zeros(125, np.uint8), np.full(20, 7, np.uint8)
    bitmap[:2] = 0xFF  # sixteen of twenty
    for coded in (
        np.concatenate([bitmap, packed]),
        np.concatenate([np.full(125, 0xFF, np.uint8), packed]),
    ):
        parts = (Plane("raw", 125), Plane("raw", 20))
        refused(coded, (Plane("sparse", 145, parts),), nbytes)


def test_a_bitmap_of_another_length_is_refused():
    parts = (Plane("raw", 124), Plane("raw", 21))
    refused(np.zeros(145, np.uint8), (Plane("sparse", 145, parts),), 1000)


def test_more_bytes_than_the_plane_has_are_refused():
    parts = (Plane("raw", 125), Plane("raw", 876))
    refused(np.zeros(1001, np.uint8), (Plane("sparse", 1001, parts),), 1000)
