"""What a save notices about the state, the user is told."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import gpuckpt
from gpuckpt.stores.memory import MemoryStore


@pytest.fixture
def store():
    return MemoryStore()


@pytest.fixture(autouse=True)
def nothing_is_ignored():
    """Every remark is an error here, but where a test expects it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def checkpointer(store: MemoryStore, **options: Any) -> gpuckpt.Checkpointer:
    return gpuckpt.Checkpointer("", store=store, **options)


def test_a_tensor_with_nans_is_named_with_its_counts(store):
    weights = np.ones(1000, np.float32)
    weights[[3, 5]], weights[7] = np.nan, -np.inf
    with pytest.warns(RuntimeWarning, match=r"step 3 holds .*model\.w \(2 NaN, 1 inf of 1000\)"):
        gpuckpt.save("", {"model": {"w": weights, "fine": np.ones(3)}}, 3, store=store)


@pytest.mark.parametrize("snapshot", ["copy", "hold"])
def test_a_checkpointer_warns_in_the_loop_not_in_its_own_thread(store, snapshot):
    state = {"w": np.full(10, np.nan)}
    with checkpointer(store, snapshot=snapshot) as ckpt:
        pending = ckpt.save(1, state)
        pending.result(60)
        with pytest.warns(RuntimeWarning, match="step 1 holds values that aren't finite: w"):
            ckpt.wait()
        assert len(pending.stats.remarks) == 1


def test_finite_states_that_change_are_not_remarked_upon(store):
    state: dict[str, Any] = {
        "w": np.zeros(10),
        "n": np.arange(3),
        "empty": np.empty((0, 2), np.float32),
    }
    with checkpointer(store) as ckpt:
        for step in range(1, 4):
            state["w"] += 1
            assert ckpt.save(step, state).result(60).step == step


def test_a_state_that_stands_still_while_the_steps_go_on_raises_an_alarm(store):
    state: dict[str, Any] = {"w": np.ones(10), "trained": True}
    with checkpointer(store) as ckpt:
        ckpt.save(1, state)
        ckpt.save(2, {**state, "lr": 0.1})
        with pytest.warns(RuntimeWarning, match="step 2 holds the same bytes .* as step 1"):
            ckpt.wait()
        state["w"][0] = 2
        ckpt.save(3, state)


def test_the_alarm_compares_with_what_was_restored_too(store):
    state = {"w": np.ones(10)}
    with checkpointer(store) as ckpt:
        ckpt.save(1, state)
    with checkpointer(store) as ckpt:
        assert ckpt.resume(state) == 1
        ckpt.save(2, state)
        with pytest.warns(RuntimeWarning, match="step 2 holds the same bytes"):
            ckpt.wait()


def test_saving_a_step_again_or_a_state_without_bytes_is_no_alarm(store):
    with checkpointer(store) as ckpt:
        ckpt.save(1, {"w": np.ones(10)})
        ckpt.save(1, {"w": np.ones(10)})
        ckpt.save(2, {"lr": 0.1, "empty": np.empty(0)})
        ckpt.save(3, {"lr": 0.1, "empty": np.empty(0)})


def test_a_single_save_is_no_training_loop_and_raises_no_alarm(store):
    for step in (1, 2):
        gpuckpt.save("", {"w": np.ones(10)}, step, store=store)
