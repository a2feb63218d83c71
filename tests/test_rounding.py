"""float32 rounded to two bytes: the bits that everybody else's rounding gives."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuckpt.rounding import NARROW, round_by_numpy, round_to

KINDS: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
of_each_kind = pytest.mark.parametrize("dtype", NARROW)


def rounded(dtype: str, words: np.ndarray, by: Any = round_to) -> np.ndarray:
    out = np.empty(2 * words.size, np.uint8)
    by(dtype, words.view(np.uint8), out)
    found: np.ndarray = out.view(np.uint16)
    return found


def by_library(dtype: str, words: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        narrow: np.ndarray = words.view(np.float32).astype(KINDS[dtype])
    return narrow.view(np.uint16)


def is_signalling(words: np.ndarray) -> np.ndarray:
    """NaNs of which libraries make different ones."""
    quiet = np.uint32(0x00400000)
    found: np.ndarray = ((words & 0x7FFFFFFF) > 0x7F800000) & (words & quiet == 0)
    return found


def edges(dtype: str) -> np.ndarray:
    """Every narrow value as float32, what lies halfway to the next, and the neighbours of both."""
    values = np.arange(1 << 16, dtype=np.uint16).view(KINDS[dtype]).astype(np.float32)
    words = values.view(np.uint32)
    near = words[:, None] + np.array([-1, 0, 1], np.int64).astype(np.uint32)
    half = np.uint32(1 << (15 if dtype == "bfloat16" else 12))
    with np.errstate(all="ignore"):
        middle = ((values + np.append(values[1:], values[:1])) / 2).view(np.uint32)
    around = np.concatenate([near, near + half, near - half]).ravel()
    return np.concatenate([around, middle, middle + np.uint32(1), middle - np.uint32(1)])


@of_each_kind
@pytest.mark.parametrize("by", [round_to, round_by_numpy], ids=["loops", "numpy"])
def test_every_edge_between_two_values_is_rounded_as_libraries_do(dtype, by):
    words = edges(dtype)
    words = words[~is_signalling(words)]
    np.testing.assert_array_equal(rounded(dtype, words, by), by_library(dtype, words))


@of_each_kind
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 70_000), st.integers(0, 3))
def test_any_bits_at_any_address_are_rounded_as_libraries_do(dtype, seed, count, ahead):
    rng = np.random.default_rng(seed)
    space = np.empty(4 * count + 3, np.uint8)
    raw = space[ahead : ahead + 4 * count]
    raw[:] = rng.integers(0, 2**32, count, np.uint32).view(np.uint8)
    words = raw.copy().view(np.uint32)
    out = np.empty(2 * count + 3, np.uint8)[ahead : ahead + 2 * count]
    round_to(dtype, raw, out)
    found = out.copy().view(np.uint16)
    plain = ~is_signalling(words)
    np.testing.assert_array_equal(found[plain], by_library(dtype, words)[plain])
    np.testing.assert_array_equal(found, rounded(dtype, words, round_by_numpy))


def test_nans_keep_their_sign_and_stay_quiet():
    words = np.array([0x7F800001, 0xFF800001, 0x7FC00000, 0xFFFFFFFF] * 4096, np.uint32)
    for by in (round_to, round_by_numpy):
        assert rounded("bfloat16", words, by)[:4].tolist() == [0x7FC0, 0xFFC0, 0x7FC0, 0xFFC0]
        assert rounded("float16", words, by)[:4].tolist() == [0x7E00, 0xFE00, 0x7E00, 0xFFFF]


@of_each_kind
def test_torch_rounds_all_that_is_a_number_to_the_same_bits(dtype):
    torch = pytest.importorskip("torch")
    words = edges(dtype)
    words = words[(words & 0x7FFFFFFF) <= 0x7F800000]
    narrow = torch.from_numpy(words.view(np.float32)).to(getattr(torch, dtype))
    found = narrow.view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(rounded(dtype, words), found)
