"""The compiled loops' zstd frames: any decoder reads them, and nothing outside is touched."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpuckpt.arena import ZSTD, Slot
from gpuckpt.coding import WORTHWHILE, compress, decode_planes, sample_entropy
from gpuckpt.native import VARIABLE, native
from gpuckpt.spec import Plane
from tests.often import often
from tests.test_native import Room, both, loops

Bytes = npt.NDArray[np.uint8]

BLOCK = 1 << 14
SIZES = (
    0,
    1,
    2,
    5,
    63,
    64,
    65,
    1023,
    1024,
    1025,
    *(n * BLOCK + k for n in (1, 2, 5) for k in (-1, 0, 1)),
)
SHARES = (0.9, 0.5, 0.1, 0.02, 0.006)


def decoded(frame: Bytes) -> bytes:
    """Without a word about how large it may be, and with it, piece by piece."""
    whole = zstandard.ZstdDecompressor().decompress(frame.tobytes())
    reader = zstandard.ZstdDecompressor(max_window_size=BLOCK).stream_reader(frame.tobytes())
    assert reader.read() == whole
    return whole


def of_shares(shares: npt.NDArray[np.float64], size: int, rng: np.random.Generator) -> Bytes:
    """Bytes that occur as often as said."""
    every = rng.choice(len(shares), size, p=shares / shares.sum())
    return rng.permutation(256)[every].astype(np.uint8)


def geometric(share: float, size: int, rng: np.random.Generator) -> Bytes:
    """Each byte by some factor rarer than the one before: codes of all lengths, or too long."""
    return of_shares((1 - share) ** np.arange(256.0), size, rng)


@st.composite
def planes(draw: st.DrawFn) -> Bytes:
    size, seed = draw(st.sampled_from(SIZES)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(draw(st.integers(1, 3))):  # of different kinds, so that codes change
        kind = draw(st.sampled_from(("geometric", "few", "mostly one", "runs", "noise")))
        if kind == "geometric":
            parts.append(geometric(draw(st.sampled_from(SHARES)), size, rng))
        elif kind == "few":
            parts.append(rng.integers(0, draw(st.integers(1, 256)), size).astype(np.uint8))
        elif kind == "mostly one":
            rare = rng.random(size) < draw(st.sampled_from((0.0001, 0.01, 0.3)))
            parts.append(np.where(rare, rng.integers(0, 256, size), 77).astype(np.uint8))
        elif kind == "runs":
            parts.append(
                np.repeat(rng.integers(0, 256, size // 50 + 1), 50)[:size].astype(np.uint8)
            )
        else:
            parts.append(rng.integers(0, 256, size).astype(np.uint8))
    return np.concatenate(parts)


@settings(deadline=None, max_examples=often(200))
@given(planes(), st.integers(0, 9), st.sampled_from((64, 0, -1, -100, -20_000)))
@example(np.zeros(3 * BLOCK, np.uint8), 0, 0)
@example(np.arange(3 * BLOCK).astype(np.uint8), 0, 64)
def test_any_plane_comes_back_from_its_frame(plane, offset, spare):
    given_room = Room(plane.size, offset, plane)
    for one in both():
        room = Room(max(plane.size + spare, 0), offset)
        length = one.huffman(given_room.array, room.array)
        assert 0 <= length <= room.array.size
        if length:
            frame = room.array[:length]
            assert zstandard.frame_content_size(frame.tobytes()) == plane.size
            assert decoded(frame) == plane.tobytes()
        assert room.sound()
        assert given_room.sound()
        assert np.array_equal(given_room.array, plane)
    assert length or spare < 64 or not plane.size


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 4000), min_size=2, max_size=256),
    st.integers(0, 2**32 - 1),
)
@example([1] * 256, 0)
@example([1, 1], 0)
@example([1, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4000], 0)
@example([4000] * 128 + [1] * 128, 0)
@example([1, 2, 4, 8, 18, 37, 77, 161, 332, 687, 1421, 2937, 3900, 3900, 2810], 0)
def test_codes_of_any_counts_can_be_decoded(counts, seed):
    """Whether they are too long for the format, or all alike, or of the highest bytes alone."""
    rng = np.random.default_rng(seed)
    for names in (rng.permutation(256)[: len(counts)], np.arange(256 - len(counts), 256)):
        plane = np.repeat(names.astype(np.uint8), counts)
        plane = rng.permutation(plane)[: 2 * BLOCK]
        room = np.zeros(plane.size + 64, np.uint8)
        length = loops().huffman(plane, room)
        assert decoded(room[:length]) == plane.tobytes()


@pytest.mark.parametrize("share", [0.3, 0.1, 0.03])
def test_a_frame_takes_little_more_than_the_entropy(share):
    plane = geometric(share, 1 << 20, np.random.default_rng(1))
    room = np.zeros_like(plane)
    length = loops().huffman(plane, room)
    bound = plane.size * sample_entropy(plane) / 8
    tuned = zstandard.ZstdCompressor(compression_params=ZSTD).compress(plane.tobytes())
    assert length < 1.03 * bound
    assert length < 1.01 * len(tuned)


def test_long_codes_are_shortened_where_that_costs_least():
    """A sign that is rare, beside seven bits of noise: 128 bytes are frequent, 128 are rare."""
    rng = np.random.default_rng(1)
    plane = (rng.integers(0, 128, 1 << 18) * 2 + (rng.random(1 << 18) < 0.02)).astype(np.uint8)
    length = loops().huffman(plane, np.zeros_like(plane))
    assert length < 0.905 * plane.size


@pytest.mark.parametrize("size", [4000, BLOCK, 3 * BLOCK])
def test_what_follows_noise_is_coded_all_the_same(size):
    """After a block that gained nothing, the next ones are looked at more shortly."""
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, 2 * BLOCK).astype(np.uint8)
    plane = np.concatenate([noise, geometric(0.3, size, rng)])
    length = loops().huffman(plane, np.zeros(plane.size + 64, np.uint8))
    assert length < noise.size + 0.5 * size


def test_runs_are_counted_where_pieces_begin():
    plane = np.arange(256 * 100 + 255).astype(np.uint8)
    assert loops().count_runs(plane) == 0
    for at in (0, 256, 2560, 25_600, 64):
        plane[at : at + 8] = 7
    assert loops().count_runs(plane) == 3
    assert loops().count_runs(np.zeros(0, np.uint8)) == 0
    assert loops().count_runs(np.zeros(512, np.uint8)) == 2


@pytest.mark.parametrize("kind", ["numbers", "rows of zeros"])
def test_planes_with_runs_are_left_to_zstd_and_all_are_decoded_alike(kind, monkeypatch):
    """Runs are matches, of which Huffman's codes alone know nothing."""
    rng = np.random.default_rng(1)
    plane = geometric(0.2, 1 << 16, rng)
    if kind != "numbers":
        plane.reshape(-1, 128)[rng.random(512) < 0.5] = 0
    monkeypatch.setattr("gpuckpt.native.native", lambda: None)
    slot = Slot(*np.zeros((3, plane.size), np.uint8))
    zstd = slot.coded[: compress(plane, slot.coded, slot.compressor)].tobytes()
    monkeypatch.setattr("gpuckpt.native.native", loops)
    length = compress(plane, slot.coded, slot.compressor)
    assert 0 < length < WORTHWHILE * plane.size
    assert (slot.coded[:length].tobytes() != zstd) == (kind == "numbers")
    room = np.zeros_like(plane)
    decode_planes(slot.coded[:length], [Plane("zstd", length)], slot, [room], "here")
    assert np.array_equal(room, plane)


def test_without_the_loops_frames_are_zstds_own(monkeypatch):
    plane = geometric(0.2, 1 << 16, np.random.default_rng(1))
    monkeypatch.setenv(VARIABLE, "0")
    native.cache_clear()
    slot = Slot(*np.zeros((3, plane.size), np.uint8))
    length = compress(plane, slot.coded, slot.compressor)
    assert slot.coded[:length].tobytes() == slot.compressor.compress(plane.tobytes())
    native.cache_clear()
