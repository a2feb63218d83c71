"""Leaves without memory: what is wanted on a GPU is made there, and on the host beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpuckpt
from gpuckpt.arrays import Filled, Hollow
from gpuckpt.boxes import Box
from gpuckpt.dtypes import to_numpy
from gpuckpt.stores.memory import MemoryStore


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "bool"])
def test_boxes_are_made_on_the_devices_that_want_them(dtype):
    bits = np.random.default_rng(3).integers(0, 2, (64, 96, to_numpy(dtype).itemsize), np.uint8)
    full = bits.view(to_numpy(dtype))[..., 0]
    store = MemoryStore()
    gpuckpt.save("", {"w": full}, store=store)
    upper, lower, corner = Box((0, 0), (32, 96)), Box((32, 0), (32, 96)), Box((5, 7), (9, 11))
    wanted = ((upper, "cuda:0"), (lower, "cpu"), (corner, "cuda:0"))
    state: dict[str, Any] = {"w": Hollow(dtype, (64, 96), wanted)}
    with gpuckpt.Checkpointer("", store=store, every=gpuckpt.Every(steps=1)) as ckpt:
        ckpt.resume(state)
    filled = state["w"]
    assert isinstance(filled, Filled)
    for box, device in wanted:
        tensor = filled.made[box]
        array = tensor.array if device == "cpu" else tensor.array.get()
        assert tensor.spec.device == device
        assert array.tobytes() == np.ascontiguousarray(full[box.slices]).tobytes()
