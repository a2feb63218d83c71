"""`hold`: updates wait for reads, nothing hangs, and who changes what is read is found out."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cupy as cp
import numpy as np
import pytest

import gpuckpt
from gpuckpt.devices import kernels
from gpuckpt.stores.memory import MemoryStore
from tests.cuda.held import (
    CHUNK,
    COUNT,
    FEW,
    LEAST,
    SLOTS,
    StuckStore,
    checkpoints,
    failure_of,
    filled,
    goes_on,
    has_all_slots,
    held_up,
    is_saved,
    new_stream,
)

VIEWS: dict[str, Callable[[Any], Any]] = {
    "contiguous": lambda array: array,
    "transposed": lambda array: array.reshape(512, -1).T,
    "reversed": lambda array: array[::-1],
}


@pytest.fixture(autouse=True)
def no_garbage():
    """Page-locked memory of earlier tests isn't freed in the midst of these: that waits."""
    gc.collect()


def announced(store: MemoryStore, **options: Any) -> gpuckpt.Checkpointer:
    """A checkpointer that trusts the loop to announce its updates."""
    ckpt = checkpoints(store, "hold", memory=LEAST, **options)
    with ckpt.update():
        return ckpt


# ---- who waits ----------------------------------------------------------------------------------


def test_an_update_waits_on_the_host_until_the_last_read_was_given():
    store, stream, array = MemoryStore(), new_stream(), filled(1)
    with announced(store) as ckpt, held_up(ckpt) as gate:
        assert array.nbytes > ckpt._resources.budget_nbytes
        pending = ckpt.save(1, {"w": array})
        with stream, ckpt.update():
            assert gate.is_open
            array += np.uint32(1)
        pending.result(60)
    assert is_saved(store, 1)
    assert (array.get() == 2).all()


def test_nothing_hangs_when_the_caller_frees_memory_and_loads_a_kernel_after_an_update():
    """CUDA lets both wait for all streams: none may stand still until a save comes on."""
    store, stream, array, other = MemoryStore(), new_stream(), filled(1), cp.zeros(COUNT, np.uint32)
    with announced(store) as ckpt, held_up(ckpt):
        ckpt.save(1, {"w": array})
        with stream, ckpt.update():
            array += np.uint32(1)
            del other
            cp.get_default_memory_pool().free_all_blocks()
            cp.RawModule(code='extern "C" __global__ void none() {}').get_function("none")
        ckpt.wait()
    assert goes_on(stream.synchronize)
    assert is_saved(store, 1)


def test_without_update_in_the_loop_save_waits_until_all_was_read():
    store, array = MemoryStore(), filled(1)
    with checkpoints(store, "hold", memory=LEAST) as ckpt:
        for step in (1, 2):
            with held_up(ckpt) as gate:
                pending = ckpt.save(step, {"w": array})
                assert gate.is_open
                assert pending.staged.is_set()
                with new_stream() as other:
                    array += np.uint32(1)
                    other.synchronize()
    assert is_saved(store, 1, 1)
    assert is_saved(store, 2, 2)


# ---- host memory of its own ---------------------------------------------------------------------


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_what_has_host_memory_of_its_own_is_within_the_budget_and_comes_back(view, share):
    store, array = MemoryStore(), cp.arange(COUNT, dtype=np.uint32)
    memory = SLOTS + int(share * 1.1 * array.nbytes)
    with checkpoints(store, "hold", memory=memory) as ckpt:
        for step in (1, 2):
            pending = ckpt.save(step, {"w": VIEWS[view](array), "few": filled(7, 3)})
            pending.result(60)
            ahead = ckpt._resources.devices["cuda:0"].ahead_nbytes
            assert share * array.nbytes * 0.6 < ahead
            assert SLOTS + ahead <= pending.stats.host_nbytes <= memory
            found = gpuckpt.load("", step, "cpu", store=store)
            assert found["w"].tobytes() == VIEWS[view](array).get().tobytes()
            assert (found["few"] == 7).all()
            with ckpt.update():
                array += np.uint32(1)


def test_a_smaller_state_keeps_the_memory_and_a_larger_one_takes_more():
    store = MemoryStore()
    with checkpoints(store, "hold") as ckpt:
        sizes = []
        for step, count in enumerate((COUNT, FEW, 2 * COUNT), 1):
            ckpt.save(step, {"w": filled(step, count)}).result(60)
            sizes.append(ckpt._resources.devices["cuda:0"].ahead_nbytes)
            assert is_saved(store, step, step)
    assert 0 < sizes[0] == sizes[1] < sizes[2]


def test_unchanged_chunks_are_not_brought_to_memory_of_their_own():
    store, array = MemoryStore(), filled(1)
    with checkpoints(store, "hold", full_every=8) as ckpt:
        ckpt.save(1, {"w": array}).result(60)
        with ckpt.update():
            array[-1] += np.uint32(1)
        pending = ckpt.save(2, {"w": array})
        pending.result(60)
        assert 0 < pending.stats.brought_nbytes <= CHUNK
    found = gpuckpt.load("", 2, "cpu", store=store)["w"]
    assert found.tobytes() == array.get().tobytes()


def test_a_change_between_two_looks_at_what_came_at_once_is_found_out(monkeypatch):
    store, array = MemoryStore(), filled(1)
    digest = kernels.digest_chunks

    def change_and_digest(*arguments: Any) -> None:
        with arguments[-1]:
            array[-1:] += np.uint32(1)
        digest(*arguments)

    with checkpoints(store, "hold") as ckpt, ckpt.update():
        monkeypatch.setattr(kernels, "digest_chunks", change_and_digest)
        ckpt.save(1, {"w": array})
        failure = failure_of(ckpt)
        monkeypatch.undo()
        assert isinstance(failure, gpuckpt.TornError)
        ckpt.save(2, {"w": array}).result(60)
    assert gpuckpt.load("", 2, "cpu", store=store)["w"].tobytes() == array.get().tobytes()


@pytest.mark.skipif(cp.cuda.runtime.getDeviceCount() < 2, reason="one device")
def test_what_a_failed_save_has_begun_does_not_write_over_the_tables_of_the_next(monkeypatch):
    store, filter_chunks, fails = MemoryStore(), kernels.filter_chunks, [True]
    large = {f"t{at}": filled(at, COUNT // 2) for at in range(16)}
    with cp.cuda.Device(1):
        large |= {"u": filled(1)}
    one = cp.arange(400_000, dtype=np.uint32)
    small = {f"s{at}": one[at * 100 : (at + 1) * 100] for at in range(4000)}
    cp.cuda.Device().synchronize()

    def refuse_once(*arguments: Any) -> None:
        if cp.cuda.Device().id == 1 and fails:
            fails.clear()
            raise gpuckpt.DeviceError("refused")
        filter_chunks(*arguments)

    with checkpoints(store, "hold", codec="raw") as ckpt, ckpt.update():
        monkeypatch.setattr(kernels, "filter_chunks", refuse_once)
        ckpt.save(1, large)
        assert isinstance(failure_of(ckpt), gpuckpt.DeviceError)
        ckpt.save(2, small).result(60)
    found = gpuckpt.load("", 2, "cpu", store=store)
    assert all((found[name] == array.get()).all() for name, array in small.items())


def test_a_copy_after_a_hold_takes_its_host_memory_back():
    store, state = MemoryStore(), {"w": filled(1), "h": np.ones(COUNT, np.float32)}
    with checkpoints(store, "hold", memory=SLOTS + 5 * COUNT) as ckpt:
        ckpt.save(1, {"w": state["w"]}).result(60)
        device = ckpt._resources.devices["cuda:0"]
        assert device.ahead_nbytes > 4 * COUNT
        ckpt._saves._options = replace(ckpt._options, snapshot="copy")
        ckpt.save(2, state).result(60)
        assert not device.ahead_nbytes


# ---- torn ---------------------------------------------------------------------------------------


class Changed:
    """A save whose first chunks have been read, and whose last ones have no slot yet."""

    def __init__(self, snapshot: str, state: dict[str, Any], memory: int = LEAST) -> None:
        self.store = StuckStore()
        self.ckpt = checkpoints(self.store, snapshot, memory=memory)
        with self.ckpt.update():
            self.ckpt.save(1, state)
        assert self.store.reached.wait(30)

    def end(self) -> BaseException | None:
        self.store.freed.set()
        return failure_of(self.ckpt)

    def assert_torn(self, name: str) -> None:
        failure = self.end()
        assert isinstance(failure, gpuckpt.TornError)
        assert failure.name == name
        assert name in str(failure)
        assert self.ckpt.steps() == []
        assert not self.store.files
        assert has_all_slots(self.ckpt)


def add_one(array: Any) -> None:
    """On a stream of its own, and unannounced."""
    with new_stream() as stream:
        array += np.uint32(1)
        stream.synchronize()


@pytest.mark.parametrize("view", VIEWS)
def test_a_change_while_it_is_read_is_found_out(view):
    array = filled(1)
    save = Changed("hold", {"deep": {"w": VIEWS[view](array)}})
    add_one(array)
    save.assert_torn("deep.w")
    with save.ckpt.update():
        save.ckpt.save(2, {"deep": {"w": VIEWS[view](array)}}).result(60)
    save.ckpt.close()
    assert (
        gpuckpt.load("", 2, "cpu", store=save.store)["deep"]["w"].tobytes() == array.get().tobytes()
    )


@pytest.mark.parametrize("view", VIEWS)
def test_a_change_of_host_memory_while_it_is_read_is_found_out(view):
    array = np.full(COUNT, 1, np.uint32)
    save = Changed("hold", {"w": VIEWS[view](array)})
    array += np.uint32(1)
    save.assert_torn("w")
    save.ckpt.close()


def test_a_change_of_what_was_read_already_is_found_out():
    first, second = filled(1, CHUNK // 16), filled(1)
    save = Changed("hold", {"a": first, "b": second})
    add_one(first)
    save.assert_torn("a")
    save.ckpt.close()


def test_a_change_of_one_element_of_a_strided_tensor_is_found_out():
    first, second = filled(1, FEW).reshape(256, -1).T, filled(1)
    save = Changed("hold", {"a": first, "b": second}, memory=3 * LEAST)
    add_one(first[:1, :1])
    save.assert_torn("a")
    save.ckpt.close()


def test_a_change_of_one_device_and_none_of_the_host_names_the_device_tensor():
    array, host = filled(1), np.full(COUNT, 5, np.uint32)
    save = Changed("hold", {"w": array, "h": host})
    add_one(array)
    save.assert_torn("w")
    save.ckpt.close()


def test_an_announced_change_is_no_tear():
    stream, array = new_stream(), filled(1)
    save = Changed("hold", {"w": array})
    threading.Timer(0.1, save.store.freed.set).start()
    with stream, save.ckpt.update():
        array += np.uint32(1)
    assert save.end() is None
    stream.synchronize()
    save.ckpt.close()
    assert is_saved(save.store, 1)
    assert (array.get() == 2).all()


@pytest.mark.parametrize("where", ["device", "host"])
def test_a_copy_is_not_affected(where):
    array = filled(1) if where == "device" else np.full(COUNT, 1, np.uint32)
    save = Changed("copy", {"w": array}, memory=64 * LEAST)
    assert save.ckpt._saves.save is not None
    assert save.ckpt._saves.save.pending.staged.wait(30)
    if where == "device":
        add_one(array)
    else:
        array += np.uint32(1)
    assert save.end() is None
    save.ckpt.close()
    assert is_saved(save.store, 1)
