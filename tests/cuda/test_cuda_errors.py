"""What CUDA refuses becomes a gpuckpt error that says what to do; nothing is committed or hangs."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import cupy as cp
import numpy as np
import pytest

import gpuckpt
from gpuckpt.arrays import dlpack
from gpuckpt.devices import kernels
from gpuckpt.stores.memory import MemoryStore
from tests.cuda.held import (
    COUNT,
    FEW,
    LEAST,
    StuckStore,
    checkpoints,
    failure_of,
    filled,
    goes_on,
    has_all_slots,
    is_saved,
)
from tests.cuda_on_cpu import standin

OUT_OF_MEMORY, ILLEGAL_ADDRESS, LAUNCH_FAILURE, ECC = 2, 700, 719, 214
# CuPy's streams complain when they go on a device that is lost.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)

FOREVER = 1 << 40
CALLS = ["cuLaunchKernel", "cuMemcpyAsync", "cuEventRecord", "cuEventSynchronize"]
SNAPSHOTS = ["copy", "hold"]


def saved_once(store: MemoryStore, array: Any, snapshot: str, **options: Any) -> Any:
    """A checkpointer that has its memory and its kernels, and a state that has changed since."""
    ckpt = checkpoints(store, snapshot, **options)
    ckpt.save(1, {"w": array}).result(60)
    with ckpt.update():
        array += np.uint32(1)
    cp.cuda.Device().synchronize()
    return ckpt


def save_fails(ckpt: Any, state: Any) -> BaseException | None:
    """How the next save fails, at once or in the background; it mustn't hang."""
    failures: list[BaseException | None] = []

    def save() -> None:
        try:
            ckpt.save(2, state)
        except gpuckpt.CheckpointError as error:
            failures.append(error)
            return
        failures.append(failure_of(ckpt))

    assert goes_on(save, 60)
    return failures[0]


# ---- memory -------------------------------------------------------------------------------------


def test_a_copy_without_memory_says_what_to_do_and_auto_holds(faults):
    store, array = MemoryStore(), filled(1)
    with checkpoints(store, "hold") as ckpt:
        ckpt.save(1, {"w": array}).result(60)
    faults("cuMemAlloc", error=OUT_OF_MEMORY, times=FOREVER)
    cp.get_default_memory_pool().free_all_blocks()
    with checkpoints(store, "copy") as ckpt:
        failure = save_fails(ckpt, {"w": array})
    assert isinstance(failure, gpuckpt.DeviceMemoryError)
    assert "cuda:0" in str(failure)
    assert "snapshot='hold'" in str(failure)
    assert ckpt.steps() == [1]


def test_auto_holds_where_the_free_memory_is_in_pieces(faults):
    store, array = MemoryStore(), filled(1)
    with saved_once(store, array, "hold") as ckpt:
        ckpt._saves._options = type(ckpt._options)("auto", "auto", "wait", "raise", 8)
        cp.get_default_memory_pool().free_all_blocks()
        fault = faults("cuMemAlloc", error=OUT_OF_MEMORY, times=FOREVER)
        pending = ckpt.save(2, {"w": array})
        pending.result(60)
        assert fault.struck
        assert pending.stats.mode == "hold"
    assert is_saved(store, 2, 2)


def test_what_is_held_goes_by_the_slots_where_no_more_memory_can_be_page_locked(faults, caplog):
    store, array = MemoryStore(), filled(1)
    with checkpoints(store, "hold") as ckpt:
        fault = faults("cudaHostAlloc", error=OUT_OF_MEMORY, after=1, times=FOREVER)
        pending = ckpt.save(1, {"w": array})
        pending.result(60)
        assert fault.struck
        assert "as slots become free" in caplog.text
        standin.heal()
        ckpt.save(2, {"w": array}).result(60)
        assert ckpt._resources.devices["cuda:0"].ahead_nbytes > array.nbytes
    assert is_saved(store, 1)
    assert is_saved(store, 1, 2)


def test_page_locked_memory_that_is_refused_says_what_to_do(faults):
    store, array = MemoryStore(), filled(1)
    with checkpoints(store, "copy") as ckpt:
        fault = faults("cudaHostAlloc", error=OUT_OF_MEMORY, times=FOREVER)
        failure = save_fails(ckpt, {"w": array})
        assert fault.struck
        assert isinstance(failure, gpuckpt.DeviceMemoryError)
        assert "page-locked" in str(failure)
        assert "memory=" in str(failure)
        standin.heal()
        ckpt.save(3, {"w": array}).result(60)
        assert ckpt.steps() == [3]


def test_a_restore_without_memory_says_what_to_do(faults):
    store, array = MemoryStore(), filled(1)
    with checkpoints(store, "copy") as ckpt:
        ckpt.save(1, {"w": array}).result(60)
    cp.get_default_memory_pool().free_all_blocks()
    faults("cuMemAlloc", error=OUT_OF_MEMORY, times=FOREVER)
    with pytest.raises(gpuckpt.DeviceMemoryError, match="device='cpu'"):
        gpuckpt.load("", store=store)
    assert gpuckpt.load("", device="cpu", store=store)["w"].size == COUNT


# ---- a call that is refused once ----------------------------------------------------------------


@pytest.mark.parametrize("snapshot", SNAPSHOTS)
@pytest.mark.parametrize("call", CALLS)
def test_any_call_that_is_refused_once_fails_the_save_and_not_the_next(faults, call, snapshot):
    """The first call of its kind, the second, and so on, until a save makes no more of them."""
    array = filled(1, FEW)
    for after in range(100):
        store = MemoryStore()
        with saved_once(store, array, snapshot) as ckpt:
            fault = faults(call, error=1, after=after)
            failure = save_fails(ckpt, {"w": array})
            struck = fault.struck
            standin.heal()
            # One wait, that for an earlier opening, is made for safety alone.
            spared = failure is None and call == "cuEventSynchronize" and snapshot == "hold"
            assert spared or isinstance(failure, gpuckpt.DeviceError) == bool(struck)
            assert ckpt.steps() == ([1, 2] if failure is None else [1])
            assert has_all_slots(ckpt)
            with ckpt.update():
                array += np.uint32(1)
            expected = int(array[0])
            ckpt.save(3, {"w": array}).result(60)
            assert is_saved(store, expected, 3)
        if not struck:
            break
    assert 0 < after < 100


# ---- a lost device ------------------------------------------------------------------------------


@pytest.mark.parametrize("snapshot", SNAPSHOTS)
@pytest.mark.parametrize("error", [ILLEGAL_ADDRESS, LAUNCH_FAILURE, ECC])
@pytest.mark.parametrize("call", CALLS)
def test_a_device_lost_at_any_call_of_a_save_says_so(faults, call, error, snapshot):
    array = filled(1, FEW)
    for after in range(100):
        store = MemoryStore()
        ckpt = saved_once(store, array, snapshot)
        fault = faults(call, error=error, after=after, sticky=True)
        failure = save_fails(ckpt, {"w": array})
        struck = fault.struck
        assert_lost(failure) if struck else assert_saved(failure)
        assert ckpt.steps() == [1] + [2] * (not struck)
        assert goes_on(ckpt.close)
        standin.heal()
        with checkpoints(store, snapshot) as again:  # the lock was given back
            assert again.restore({"w": array}) in (1, 2)
        if not struck or error != ILLEGAL_ADDRESS:
            break
    assert after < 100


def assert_lost(failure: BaseException | None) -> None:
    assert isinstance(failure, gpuckpt.DeviceError)
    assert "the device is lost to this process" in str(failure)
    assert "cuda:0" in str(failure)


def assert_saved(failure: BaseException | None) -> None:
    assert failure is None


def test_a_device_lost_while_an_update_waits_lets_everything_end(faults):
    store, array = StuckStore(), filled(1)
    store.freed.set()
    ckpt = saved_once(store, array, "hold", memory=LEAST)
    store.freed.clear()
    store.reached.clear()

    def lose() -> None:
        assert store.reached.wait(30)
        faults("cuLaunchKernel", error=ECC, sticky=True)
        store.freed.set()

    ckpt.save(2, {"w": array})
    losing = threading.Thread(target=lose)
    losing.start()
    with pytest.raises(gpuckpt.DeviceError, match="the device is lost"), ckpt.update():
        pass
    losing.join()
    assert_lost(failure_of(ckpt))
    assert ckpt.steps() == [1]
    assert goes_on(ckpt.close)


def test_an_update_after_the_device_was_lost_says_so(faults):
    store, array = MemoryStore(), filled(1)
    ckpt = saved_once(store, array, "copy")
    with pytest.raises(cp.cuda.runtime.CUDARuntimeError):
        lose_the_device(faults)
    failure = save_fails(ckpt, {"w": array})
    assert_lost(failure)
    assert goes_on(ckpt.close)


@pytest.mark.parametrize("call", CALLS)
def test_a_device_lost_in_a_restore_says_so(faults, call):
    store, array = MemoryStore(), filled(1, FEW)
    ckpt = saved_once(store, array, "copy")
    for after in range(100):
        fault = faults(call, error=ILLEGAL_ADDRESS, after=after, sticky=True)
        failure = restore_fails(ckpt, array)
        struck = fault.struck
        assert_lost(failure) if struck else assert_saved(failure)
        standin.heal()
        assert has_all_slots(ckpt)
        if not struck:
            break
    assert 0 < after < 100
    ckpt.close()


def restore_fails(ckpt: Any, array: Any) -> BaseException | None:
    """How a restore fails; it mustn't hang."""
    failures: list[BaseException | None] = []

    def restore() -> None:
        try:
            ckpt.restore({"w": array})
        except gpuckpt.CheckpointError as error:
            failures.append(error)
        else:
            failures.append(None)

    assert goes_on(restore, 60)
    return failures[0]


def test_a_lost_device_leaves_other_roots_alone(faults, tmp_path: Path):
    host = {"w": np.full(COUNT, 1, np.uint32)}
    array = filled(1)
    lost = saved_once(MemoryStore(), array, "copy")
    with pytest.raises(cp.cuda.runtime.CUDARuntimeError):
        lose_the_device(faults)
    assert_lost(save_fails(lost, {"w": array}))
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, host).result(60)
        assert ckpt.restore(host) == 1
    assert (gpuckpt.load(tmp_path)["w"] == 1).all()
    lost.close()


def lose_the_device(faults: Any) -> None:
    faults("cudaMemGetInfo", error=ECC, sticky=True)
    cp.cuda.runtime.memGetInfo()


# ---- kernels and devices ------------------------------------------------------------------------


@pytest.fixture
def no_kernels(monkeypatch):
    """As if no kernel had been loaded in this process."""
    kernels._kernel.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    kernels._kernel.cache_clear()


def test_a_kernel_that_does_not_compile_says_so(no_kernels):
    source = kernels.source
    broken = {"filter": "this is no kernel;"}
    no_kernels.setattr(kernels, "source", lambda name: broken.get(name) or source(name))
    store, array = MemoryStore(), filled(1)
    with checkpoints(store, "copy") as ckpt:
        failure = save_fails(ckpt, {"w": array})
        assert isinstance(failure, gpuckpt.DeviceError)
        assert "doesn't compile" in str(failure)
        assert "this is no kernel" in str(failure)
        assert "device='cpu'" in str(failure)
        assert ckpt.steps() == []
        broken.clear()
        ckpt.save(1, {"w": array}).result(60)
    assert is_saved(store, 1)


def test_a_device_that_is_not_there_is_not_found():
    store = MemoryStore()
    gpuckpt.save("", {"w": filled(1)}, store=store)
    with pytest.raises(gpuckpt.NotFoundError, match=r"cuda:7.*device"):
        gpuckpt.load("", device="cuda:7", store=store)


class Elsewhere:
    """An array of another library on a device that this process can't see."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, 7

    def __dlpack__(self, stream: int | None = None) -> Any:
        capsule = self._array.__dlpack__(stream=stream)
        dlpack._tensor_of(capsule).device.device_id = 7
        return capsule


def test_a_tensor_on_a_device_that_cannot_be_seen_is_an_error_that_names_it():
    store = MemoryStore()
    with checkpoints(store, "copy") as ckpt:
        with pytest.raises(gpuckpt.UnsupportedError, match=r"deep\.w.*invalid device ordinal"):
            ckpt.save(1, {"deep": {"w": Elsewhere(filled(1))}})
        assert ckpt.steps() == []
        ckpt.save(2, {"deep": {"w": filled(1)}}).result(60)
        assert ckpt.steps() == [2]
