"""How far numbers moved, beside numpy's own arithmetic on the whole arrays."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuckpt.dtypes import to_numpy
from gpuckpt.moves import Moved, are_numbers, compare_bytes, compare_numbers
from gpuckpt.slabs import slabs

FLOATS = ["float16", "bfloat16", "float32", "float64", ">f4", "float8_e4m3fn", "float8_e8m0fnu"]


def bits_of(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 200_000))
def test_the_figures_are_those_of_the_whole_arrays(seed, count):
    rng = np.random.default_rng(seed)
    before = rng.standard_normal(count).astype(np.float32)
    after = (before + rng.choice([0, 1e-3], count) * rng.standard_normal(count)).astype(np.float32)

    found = compare_bytes(bits_of(before), bits_of(after), "float32")

    wide = before.astype(np.float64), after.astype(np.float64)
    apart = wide[1] - wide[0]
    assert found.count == count
    assert found.changed == np.count_nonzero(before.view("u4") != after.view("u4"))
    assert found.largest == np.abs(apart).max()
    assert found.relative == pytest.approx(
        np.linalg.norm(apart) / np.linalg.norm(wide[0]), rel=1e-9
    )
    cosine = wide[0] @ wide[1] / np.linalg.norm(wide[0]) / np.linalg.norm(wide[1])
    assert found.cosine == pytest.approx(cosine, rel=1e-9)


@settings(deadline=None)
@given(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16))
def test_two_parts_add_up_to_the_whole(one, other):
    before, after = (np.frombuffer(data, np.uint8) for data in (one, other))
    whole = compare_bytes(before, after, "float16")
    parts = Moved() + compare_bytes(before[:6], after[:6], "float16")
    parts += compare_bytes(before[6:], after[6:], "float16")
    exact = ("count", "changed", "bytes_changed", "signs", "exponents", "mantissas", "largest")
    assert [getattr(parts, name) for name in exact] == [getattr(whole, name) for name in exact]
    assert parts.squares == pytest.approx(whole.squares)
    assert (parts.broken, parts.mended) == (whole.broken, whole.mended)


@pytest.mark.parametrize(
    ("dtype", "bits", "field"),
    [
        ("float32", 31, "signs"),
        ("float32", 23, "exponents"),
        ("float32", 22, "mantissas"),
        ("bfloat16", 15, "signs"),
        ("bfloat16", 7, "exponents"),
        ("bfloat16", 6, "mantissas"),
        ("float16", 10, "exponents"),
        ("float16", 9, "mantissas"),
        ("float64", 52, "exponents"),
        ("float8_e4m3fn", 7, "signs"),
        ("float8_e4m3fn", 3, "exponents"),
        ("float8_e4m3fn", 2, "mantissas"),
        ("float8_e8m0fnu", 7, "exponents"),
        ("float4_e2m1fn", 3, "signs"),
        ("complex64", 23, "exponents"),
    ],
)
def test_each_bit_belongs_to_sign_exponent_or_mantissa(dtype, bits, field):
    width = {"complex64": 4}.get(dtype, to_numpy(dtype).itemsize)
    before = np.zeros(to_numpy(dtype).itemsize, np.uint8)
    after = before.copy()
    after[bits // 8] = 1 << bits % 8

    found = compare_bytes(before, after, dtype)

    fields = {name: getattr(found, name) for name in ("signs", "exponents", "mantissas")}
    assert fields == {**dict.fromkeys(fields, 0), field: 1}
    assert found.bytes_changed == tuple(int(at == bits // 8) for at in range(width))
    assert found.changed == 1


def test_big_endian_numbers_are_read_as_what_they_are():
    before, after = np.array([1.0, 2.0], ">f4"), np.array([1.0, 2.5], ">f4")
    found = compare_bytes(bits_of(before), bits_of(after), ">float32")
    assert found.largest == 0.5
    assert found.bytes_changed == (0, 0, 1, 0)


def test_what_is_not_finite_is_counted_and_in_no_norm():
    before = np.array([1, np.nan, np.inf, 4, np.nan, 5], np.float32)
    after = np.array([1, 2, np.inf, np.inf, np.nan, np.nan], np.float32)
    found = compare_bytes(bits_of(before), bits_of(after), "float32")
    assert (found.broken, found.mended) == (2, 1)
    assert (found.squares, found.largest) == (0, 0)
    assert found.changed == 3


def test_zeros_of_both_signs_differ_in_bits_alone():
    found = compare_bytes(
        bits_of(np.zeros(3, np.float32)), bits_of(-np.zeros(3, np.float32)), "float32"
    )
    assert (found.changed, found.signs, found.largest, found.relative) == (3, 3, 0, 0)
    assert found.cosine is None


@pytest.mark.parametrize("dtype", ["S3", "V5", "datetime64[s]"])
def test_what_is_no_number_differs_in_elements(dtype):
    item = to_numpy(dtype).itemsize
    before = np.zeros(4 * item, np.uint8)
    after = before.copy()
    after[item] = after[2 * item] = 1
    found = compare_bytes(before, after, dtype)
    assert (found.count, found.changed, found.numeric) == (4, 2, False)
    assert found.relative is found.cosine is None
    assert not are_numbers(dtype)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint64", "int64"])
def test_integers_have_differences_and_no_fields(dtype):
    before, after = np.array([0, 1, 1], dtype), np.array([1, 1, 0], dtype)
    found = compare_bytes(bits_of(before), bits_of(after), dtype)
    assert (found.changed, found.largest, found.squares) == (2, 1, 2)
    assert (found.signs, found.exponents, found.mantissas) == (0, 0, 0)


def test_numbers_of_two_types_are_compared_as_numbers():
    before = np.array([1.0, 2.0, np.nan], np.float32)
    after = np.array([1.0, 2.5, np.nan]).astype(ml_dtypes.bfloat16)
    found = compare_numbers(before, after)
    assert (found.count, found.changed, found.largest) == (3, 1, 0.5)
    assert found.bytes_changed == ()


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=4).map(tuple), st.integers(1, 40))
def test_slabs_are_all_of_a_tensor_in_order_and_none_is_too_large(shape, most):
    boxes = list(slabs(shape, most))
    numbers = np.arange(math.prod(shape)).reshape(shape)
    assert all(0 < box.count <= most for box in boxes)
    found = [numbers[box.slices].reshape(-1) for box in boxes]
    assert np.concatenate([np.empty(0, int), *found]).tolist() == list(range(numbers.size))
