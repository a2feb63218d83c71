"""Inventories of arrays in a GPU's memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import cupy
import numpy as np
import pytest

import gpuckpt
from gpuckpt.census import Census
from gpuckpt.inventory import Inventory
from tests.test_census import described, looked_at


def model() -> dict[str, Any]:
    tied = cupy.zeros((2, 3), np.float32)
    return {
        "w": {"a": cupy.ones((3, 4), np.float32), "b": tied, "c": tied},
        "t": [cupy.zeros((3, 4), np.float64).T, cupy.zeros((4, 6), np.int8)[::2, 1:]],
        "e": cupy.empty((0, 3)),
        "host": np.zeros(5),
        "lr": 0.1,
    }


def taken(census: Census, state: Any) -> Inventory:
    inventory = census.take(state)
    assert described(inventory) == looked_at(state)
    return inventory


def test_arrays_that_were_seen_before_keep_the_roster_wherever_they_lie_now():
    census = Census()
    state = model()
    first = taken(census, state)
    assert taken(census, state).roster is first.roster
    state["w"]["a"] = cupy.zeros((3, 4), np.float32)
    assert taken(census, state).roster is first.roster
    assert taken(census, model()).roster is first.roster
    assert first.by_device() == {"cuda:0": [0, 1, 2, 3, 4], "cpu": [5]}


@pytest.mark.parametrize(
    "change",
    [
        lambda s: setattr(s["w"]["a"], "shape", (4, 3)),
        lambda s: s["w"].update(a=s["w"]["a"].view(np.uint32)),
        lambda s: s["w"].update(b=cupy.zeros((2, 3), np.float32)),
        lambda s: s["w"].update(a=cupy.ones((4, 3), np.float32).T),
        lambda s: s["w"].update(a=s["w"]["a"].get()),
        lambda s: s["t"].__setitem__(0, s["t"][0].copy()),
        lambda s: s.update(host=cupy.zeros(5)),
    ],
)
def test_a_change_of_an_array_gives_a_new_roster(change):
    census, state = Census(), model()
    before = taken(census, state)
    change(state)
    after = taken(census, state)
    assert after.roster is not before.roster
    assert taken(census, state).roster is after.roster


def test_a_move_to_another_device_gives_a_new_roster():
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one device")
    census, state = Census(), model()
    before = taken(census, state)
    with cupy.cuda.Device(1):
        state["w"]["a"] = state["w"]["a"].copy()
    after = taken(census, state)
    assert after.roster is not before.roster
    assert after.specs[0].device == "cuda:1"


def test_no_array_is_held_between_two_looks():
    gc.collect()
    gc.disable()
    try:
        census = Census()
        for _ in range(3):
            state = model()
            reference = weakref.ref(state["w"]["a"])
            inventory = census.take(state)
            del state
            assert reference() is not None  # the inventory keeps its memory
            del inventory
            assert reference() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["data", "dtype", "data.ptr", "data.device_id", "data.mem"])
def test_an_array_keeps_its_memory_and_dtype_for_its_whole_life(name):
    """What makes it enough to see that it is the same array."""
    array, other = cupy.zeros(3, np.float32), cupy.ones(3, np.int32)
    *inside, last = name.split(".")
    for attribute in inside:
        array, other = getattr(array, attribute), getattr(other, attribute)
    with pytest.raises(AttributeError):
        setattr(array, last, getattr(other, last))


def test_arrays_that_take_the_place_of_others_are_found_where_they_lie():
    census, state = Census(), {"w": [cupy.full((2, 3), at, np.float32) for at in range(20)]}
    first = taken(census, state)
    for at in range(19, -1, -1):
        taken(census, state)
        state["w"][at] = None  # its object may be the next one's
        state["w"][at] = cupy.full((2, 3), -at, np.float32)
        assert taken(census, state).roster is first.roster


def test_shards_in_a_gpus_memory_are_recognised_saved_and_filled_in_place(tmp_path):
    wanted = np.arange(12, dtype=np.float32).reshape(4, 3)
    arrays = [cupy.asarray(wanted), cupy.asarray(wanted + 1).T, wanted + 2]
    state = {
        str(at): gpuckpt.Sharded(one, (8, *one.shape[1:]), (4, 0) if at != 1 else (0, 0))
        for at, one in enumerate(arrays)
    }
    census = Census()
    first = taken(census, state)
    assert taken(census, state).roster is first.roster
    assert first.by_device() == {"cuda:0": [0, 1], "cpu": [2]}
    assert [spec.label for spec in first.specs] == ["0[4:8, 0:3]", "1[0:3, 0:4]", "2[4:8, 0:3]"]
    gpuckpt.save(tmp_path, state)
    for one in arrays:
        one[...] = 0
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.restore(state)
    for at, one in enumerate(arrays):
        host = cupy.asnumpy(one)
        assert np.array_equal(host.T if at == 1 else host, wanted + at)
