"""`gpuckpt.open` brings single tensors, and parts of them, to a GPU."""

from __future__ import annotations

from typing import Any

import cupy as cp
import numpy as np
import pytest

import gpuckpt
from gpuckpt.stores.memory import MemoryStore


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_tensors_and_parts_of_them_are_read_to_a_gpu(codec):
    store = MemoryStore()
    rng = np.random.default_rng(5)
    state: dict[str, Any] = {
        "w": rng.standard_normal((700, 900), np.float32),
        "h": rng.standard_normal((33, 5)).astype(np.float16),
        "none": np.empty((0, 4), np.int64),
        "one": np.array(7, np.int32),
    }
    gpuckpt.save("", state, 1, store=store, codec=codec)
    with gpuckpt.open("", device="cuda:0", like="cupy", store=store) as file:
        for name, expected in state.items():
            found = file.get_tensor(name)
            assert isinstance(found, cp.ndarray)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert found.get().tobytes() == expected.tobytes()
        part = file.get_slice("w")[100:350:3, 40:-7]
        assert isinstance(part, cp.ndarray)
        assert np.array_equal(part.get(), state["w"][100:350:3, 40:-7])
