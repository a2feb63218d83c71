"""Interrupts in the middle of a save's beginning, and what else must not go too far."""

from __future__ import annotations

import gc
from typing import Any
from unittest.mock import patch

import cupy as cp
import numpy as np
import pytest

import gpuckpt
from gpuckpt.background import BackgroundSave
from gpuckpt.devices.cuda_copy import CudaCopy
from gpuckpt.stores.memory import MemoryStore
from tests.cuda.gates import Gate

COUNT = 1 << 16


@pytest.fixture
def store():
    yield MemoryStore()
    cp.cuda.Device().synchronize()


def state_of(*values: int) -> dict[str, Any]:
    state = {f"w{at}": cp.full(COUNT, value, np.uint32) for at, value in enumerate(values)}
    cp.cuda.Device().synchronize()
    return state


def loaded(store: MemoryStore, step: int) -> list[int]:
    state = gpuckpt.load("", step, device="cpu", store=store)
    assert all((array == array[0]).all() for array in state.values())
    return [int(array[0]) for array in state.values()]


@pytest.mark.parametrize("snapshot", ["copy", "hold"])
def test_a_save_that_an_interrupt_kept_from_beginning_has_failed_and_the_next_one_works(
    store, snapshot
):
    state = state_of(1, 2)
    with gpuckpt.Checkpointer("", store=store, snapshot=snapshot) as ckpt:
        with (
            patch.object(BackgroundSave, "start", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            ckpt.save(1, state)
        with pytest.raises(gpuckpt.CheckpointError, match="interrupt kept this from beginning"):
            ckpt.wait()
        ckpt.save(2, state).result(60)
    assert loaded(store, 2) == [1, 2]
    assert gpuckpt.Checkpointer("", store=store).steps() == [2]


def test_a_copy_whose_order_was_interrupted_never_becomes_a_checkpoint(store):
    state, stream = state_of(1, 2), cp.cuda.Stream(non_blocking=True)
    ckpt = gpuckpt.Checkpointer("", store=store, snapshot="copy")
    with stream:
        with (
            patch.object(CudaCopy, "order_update", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            ckpt.save(1, state)
        for array in state.values():
            array.fill(7)
        ckpt.wait()
        assert ckpt.steps() == []
        ckpt.save(2, state).result(60)
    ckpt.close()
    assert loaded(store, 2) == [7, 7]


def test_the_next_copy_waits_for_one_that_nobody_saves(store):
    """Its table is still to be read when the next one is written over it."""
    large, small, stream = state_of(1), state_of(9), cp.cuda.Stream(non_blocking=True)
    large["w0"] = cp.full(8 * COUNT, 1, np.uint32)
    with gpuckpt.Checkpointer("", store=store, snapshot="copy") as ckpt:
        ckpt.save(1, large).result(60)
        with stream:
            gate = Gate(stream)
            with (
                patch("gpuckpt.saving.BackgroundSave", side_effect=KeyboardInterrupt),
                pytest.raises(KeyboardInterrupt),
            ):
                ckpt.save(2, large)
            ckpt.save(3, small).result(60)
            gate.join()
        cp.cuda.Device().synchronize()
    assert loaded(store, 3) == [9]


@pytest.mark.parametrize("chunk_nbytes", [1000, 1 << 16])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_one_saved_tensor_is_restored_to_any_number_of_targets(store, chunk_nbytes, device):
    tied = np.arange(5000, dtype=np.float32).reshape(50, 100)
    names = [f"w{at}" for at in range(400)]
    gpuckpt.save("", dict.fromkeys(names, tied), store=store)
    library: Any = cp if device == "cuda" else np
    state = {name: library.zeros((50, 100), np.float32) for name in names}
    for name in names[::7]:
        state[name] = library.zeros((100, 50), np.float32).T
    with gpuckpt.Checkpointer("", store=store, chunk_nbytes=chunk_nbytes) as ckpt:
        ckpt.restore(state)
    for name in names:
        assert (cp.asnumpy(state[name]) == tied).all(), name


def test_saves_and_loads_leave_no_device_memory_behind(store):
    pool = cp.get_default_memory_pool()
    state, used = state_of(1, 2), []
    for step in range(4):
        gpuckpt.save("", state, step, store=store)
        gpuckpt.load("", store=store)
        gc.collect()
        pool.free_all_blocks()
        used.append(cp.cuda.runtime.memGetInfo()[0])
    assert used[1:] == used[:1] * 3
