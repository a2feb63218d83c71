"""Leaves without memory: a restore makes what is wanted of them, box by box."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.arrays import Filled, Hollow
from gpuckpt.boxes import Box, whole_box
from gpuckpt.stores.memory import MemoryStore

FULL = np.arange(6 * 8, dtype=np.float32).reshape(6, 8)


def saved(state: Any = None) -> MemoryStore:
    store = MemoryStore()
    gpuckpt.save("", {"w": FULL} if state is None else state, store=store)
    return store


def restored(hollow: Hollow, store: MemoryStore) -> Filled:
    state: dict[str, Any] = {"w": hollow}
    with gpuckpt.Checkpointer("", store=store) as ckpt:
        ckpt.restore(state)
    filled = state["w"]
    assert isinstance(filled, Filled)
    return filled


def places(*boxes: Box) -> tuple[tuple[Box, str], ...]:
    return tuple((box, "cpu") for box in boxes)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    rows = sorted(draw(st.lists(st.integers(0, 6), min_size=2, max_size=2, unique=True)))
    columns = sorted(draw(st.lists(st.integers(0, 8), min_size=2, max_size=2, unique=True)))
    return Box((rows[0], columns[0]), (rows[1] - rows[0], columns[1] - columns[0]))


@given(st.lists(boxes(), min_size=1, max_size=5, unique=True))
def test_each_box_becomes_an_array(wanted):
    filled = restored(Hollow("float32", (6, 8), places(*wanted)), saved())
    assert list(filled.made) == wanted
    for box, tensor in filled.made.items():
        assert np.array_equal(tensor.array, FULL[box.slices])


def test_a_whole_tensor_of_any_rank_becomes_one():
    for full in (np.array(3.5), np.empty((0, 4)), np.arange(5)):
        shape = full.shape
        hollow = Hollow(full.dtype.name, shape, places(whole_box(shape)))
        filled = restored(hollow, saved({"w": full}))
        assert np.array_equal(filled.made[whole_box(shape)].array, full)


def test_what_does_not_fit_is_said_before_anything_is_made():
    for hollow in (
        Hollow("float64", (6, 8), places(whole_box((6, 8)))),
        Hollow("float32", (6, 9), places(whole_box((6, 9)))),
    ):
        with pytest.raises(gpuckpt.MismatchError, match=r"float32\[6, 8\] in the checkpoint"):
            restored(hollow, saved())


def test_a_checkpointer_that_plans_saves_resumes_into_them():
    """It takes memory for copies of the state that it has restored, or hasn't."""
    hollow = Hollow("float32", (6, 8), places(whole_box((6, 8))))
    for store, done in ((MemoryStore(), 0), (saved(), 0)):
        state: dict[str, Any] = {"w": hollow}
        with gpuckpt.Checkpointer("", store=store, every=gpuckpt.Every(steps=1)) as ckpt:
            assert ckpt.resume(state) == done
        assert isinstance(state["w"], Filled if store.names() else Hollow)
