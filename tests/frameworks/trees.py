"""What it means that two pytrees are the same: structure, types, bits."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def bits_of(array: Any) -> bytes:
    if hasattr(array, "dtype") and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array).tobytes()


def assert_same(one: Any, other: Any) -> None:
    first, structure = jax.tree.flatten(one)
    second, other_structure = jax.tree.flatten(other)
    assert structure == other_structure
    for left, right in zip(first, second, strict=True):
        assert type(left) is type(right)
        if hasattr(left, "dtype"):
            assert (left.dtype, left.shape) == (right.dtype, right.shape)
            assert getattr(left, "weak_type", None) == getattr(right, "weak_type", None)
            assert bits_of(left) == bits_of(right)
        else:
            assert left == right
