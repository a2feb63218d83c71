"""Each wait of the CUDA device is needed: without it, a mode of the stand-in finds a wrong byte.

A scenario is right as the device is.  Then one wait is taken away, and it must go wrong.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import cupy as cp
import numpy as np
import pytest

import gpuckpt
from gpuckpt.devices import Done
from gpuckpt.devices.cuda import CudaCopy, CudaDevice, CudaHold, CudaTransfer
from gpuckpt.stores.memory import MemoryStore
from tests.cuda.gates import Gate, mode_of

COUNT = 1 << 18
CHUNK = 1 << 16


class FullStore(MemoryStore):
    """Refuses new files while it is full."""

    full = False

    def create(self, name: str) -> Any:
        if self.full:
            raise gpuckpt.StorageError("full")
        return super().create(name)


def new_stream() -> Any:
    return cp.cuda.Stream(non_blocking=True)


def filled(value: int) -> Any:
    """A state's array, after whose first kernels no later one has to be compiled."""
    array = cp.zeros(COUNT, np.uint32)
    array += np.uint32(value)
    cp.cuda.Device().synchronize()
    return array


def checkpoints(store: MemoryStore, snapshot: str) -> gpuckpt.Checkpointer:
    return gpuckpt.Checkpointer("", store=store, snapshot=snapshot, chunk_nbytes=CHUNK)


def is_saved(store: MemoryStore, value: int, step: int = 1) -> bool:
    return bool((gpuckpt.load("", step, "cpu", store=store)["w"] == value).all())


def save_behind_work(snapshot: str) -> bool:
    """The caller's stream still has to make the state when it is saved."""
    store, stream, array = MemoryStore(), new_stream(), filled(1)
    with checkpoints(store, snapshot) as ckpt, stream:
        gate = Gate(stream)
        array += np.uint32(1)
        ckpt.save(1, {"w": array}).result(60)
        gate.join()
        cp.cuda.Device().synchronize()
    return is_saved(store, 2)


def update_behind_save(snapshot: str) -> bool:
    """The next update is ready to run while the state can't yet be read."""
    store, stream, other, array = MemoryStore(), new_stream(), new_stream(), filled(1)
    with checkpoints(store, snapshot) as ckpt:
        with ckpt.update(), other:
            gate = Gate(other)
            pending = ckpt.save(1, {"w": array})
        with stream, ckpt.update():
            array += np.uint32(1)
        stream.synchronize()
        pending.result(60)
        gate.join()
        cp.cuda.Device().synchronize()
    return is_saved(store, 1)


def drop_behind_save() -> bool:
    """The state's memory goes to another array of another stream at once."""
    store, stream, other = MemoryStore(), new_stream(), new_stream()
    filled(1)
    with checkpoints(store, "copy") as ckpt:
        with other:
            array = filled(1)
        with stream:
            gate = Gate(stream)
            pending = ckpt.save(1, {"w": array})
        del array
        with other:
            again = filled_on(other, 9)
        pending.result(60)
        gate.join()
        cp.cuda.Device().synchronize()
    del again
    return is_saved(store, 1)


def filled_on(stream: Any, value: int) -> Any:
    array = cp.zeros(COUNT, np.uint32)
    array += np.uint32(value)
    stream.synchronize()
    return array


def restore_behind_work() -> bool:
    """The caller's stream still has to overwrite the state when it is restored."""
    store, stream, array = MemoryStore(), new_stream(), filled(1)
    with checkpoints(store, "copy") as ckpt:
        ckpt.save(1, {"w": array}).result(60)
        with stream:
            gate = Gate(stream)
            array += np.uint32(1)
            ckpt.restore({"w": array})
        gate.join()
        cp.cuda.Device().synchronize()
        return bool((array.get() == 1).all())


def restore_many_chunks() -> bool:
    """Each slot carries several chunks to the device, none of which is like another."""
    store, stream = MemoryStore(), new_stream()
    array = cp.asarray(np.arange(COUNT, dtype=np.uint32))
    with checkpoints(store, "copy") as ckpt:
        ckpt.save(1, {"w": array}).result(60)
        array[...] = 0
        cp.cuda.Device().synchronize()
        with stream:
            gate = Gate(stream)
            ckpt.restore({"w": array})
        gate.join()
        cp.cuda.Device().synchronize()
        return np.array_equal(array.get(), np.arange(COUNT))


def read_behind_uploads() -> bool:
    """The caller's stream reads what was uploaded, without a wait on the host.

    The engine waits for each upload on the host as well; so this is the device's own promise.
    """
    device, other, reader, array = CudaDevice(0), new_stream(), new_stream(), filled(1)
    data = device.host_memory(array.nbytes)
    data.view(np.uint32)[...] = 2
    out = filled(0)
    with other:
        gate = Gate(other)
        device.begin_uploads()
    transfer = device.upload(data, array, 0)
    with reader:
        device.finish_uploads()
        out += array
        reader.synchronize()
    transfer.wait()
    gate.join()
    cp.cuda.Device().synchronize()
    return bool((out.get() == 2).all())


def restore_after_a_failed_save() -> bool:
    """Copies to the host that a failed save began may still arrive in slots that it gave back."""
    store, array = FullStore(), cp.zeros(6 << 18, np.uint32)
    options: Any = {"codec": "zstd", "snapshot": "copy", "chunk_nbytes": 1 << 20}
    with gpuckpt.Checkpointer("", store=store, **options) as ckpt:
        ckpt.save(1, {"w": array}).result(60)
        array += np.uint32(1)
        store.full = True
        ckpt.save(2, {"w": array})
        with pytest.raises(gpuckpt.StorageError):
            ckpt.wait()
        ckpt.restore({"w": array})
        cp.cuda.Device().synchronize()
        return not array.get().any()


def nothing(*_: Any) -> None:
    """A wait that doesn't."""


def without_order_before(monkeypatch: pytest.MonkeyPatch) -> None:
    freeze = CudaDevice.freeze

    def freeze_at_once(self: Any, arrays: Any, *, copy: bool) -> Any:
        with self._stream:  # as the caller's stream: it waits for itself
            return freeze(self, arrays, copy=copy)

    monkeypatch.setattr(CudaDevice, "freeze", freeze_at_once)


def without_order_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaCopy, "order_update", nothing)
    monkeypatch.setattr(CudaHold, "order_update", nothing)


def without_transfer_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaTransfer, "wait", lambda self: self._data)


def without_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = CudaCopy.__init__

    def begin_without(self: Any, device: Any, sources: Any, copies: Any, made: Any) -> None:
        begin(self, device, (), copies, made)

    monkeypatch.setattr(CudaCopy, "__init__", begin_without)


def without_begin_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaDevice, "begin_uploads", nothing)


def without_finish_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaDevice, "finish_uploads", nothing)


def without_upload_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    upload = CudaDevice.upload

    def upload_and_go(self: Any, data: Any, array: Any, start: int) -> Any:
        upload(self, data, array, start)
        return Done(data)

    monkeypatch.setattr(CudaDevice, "upload", upload_and_go)


def without_drop_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = CudaTransfer.wait

    def wait_in_workers(self: Any) -> Any:
        waits = threading.current_thread().name.startswith("gpuckpt-work")
        return wait(self) if waits else self._data

    monkeypatch.setattr(CudaTransfer, "wait", wait_in_workers)


Fault = Callable[[pytest.MonkeyPatch], None]
ASYNC = {"lazy", "async", "slow"}
# Scenario, what is taken away, and the modes that must see it.
CASES: dict[str, tuple[Callable[[], bool], Fault, set[str]]] = {
    "copy after the caller": (lambda: save_behind_work("copy"), without_order_before, ASYNC),
    "hold after the caller": (lambda: save_behind_work("hold"), without_order_before, ASYNC),
    "update after a copy": (lambda: update_behind_save("copy"), without_order_update, ASYNC),
    "update after a hold": (lambda: update_behind_save("hold"), without_order_update, ASYNC),
    "slot read after its copy": (lambda: save_behind_work("hold"), without_transfer_wait, ASYNC),
    "sources kept": (drop_behind_save, without_sources, ASYNC),
    "uploads after the caller": (restore_behind_work, without_begin_uploads, ASYNC),
    "caller after uploads": (read_behind_uploads, without_finish_uploads, ASYNC),
    "slot reused after its upload": (restore_many_chunks, without_upload_wait, ASYNC),
    "slot reused after a drop": (restore_after_a_failed_save, without_drop_wait, {"lazy"}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_right_as_it_is(case):
    scenario, _, _ = CASES[case]
    assert scenario()


@pytest.mark.parametrize("case", CASES)
def test_a_missing_wait_is_found(case, standin_settings, monkeypatch):
    scenario, fault, found_by = CASES[case]
    mode = mode_of(standin_settings)
    if mode not in found_by:
        pytest.skip(f"mode {mode} need not find it: {', '.join(sorted(found_by))} do")
    fault(monkeypatch)
    assert any(is_wrong(scenario) for _ in range(5))


def is_wrong(scenario: Callable[[], bool]) -> bool:
    """Wrong bytes, or an error that the engine's own checks raise."""
    try:
        return not scenario()
    except gpuckpt.CorruptError:
        return True
