"""Restores that go wrong if one wait, one order or one reference is missing."""

from __future__ import annotations

import gc
import time
from typing import Any

import cupy as cp
import numpy as np

import gpuckpt
from gpuckpt.arena import AREAS, Arena
from gpuckpt.arrays import look
from gpuckpt.devices import Piece
from gpuckpt.devices.cuda import CudaDevice
from gpuckpt.plan import area_nbytes
from gpuckpt.stores.memory import MemoryStore
from tests.cuda.gates import Gate
from tests.cuda.held import (
    CHUNK,
    COUNT,
    FEW,
    LEAST,
    SLOTS,
    FullStore,
    LateStore,
    checkpoints,
    chunk_places,
    failure_of,
    filled,
    filled_on,
    has_all_slots,
    held_up,
    held_up_from,
    new_stream,
)
from tests.cuda_on_cpu import standin


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
    store, array = MemoryStore(), cp.asarray(np.arange(COUNT, dtype=np.uint32))
    with checkpoints(store, "copy", memory=LEAST) as ckpt:
        ckpt.save(1, {"w": array}).result(60)
        array[...] = 0
        cp.cuda.Device().synchronize()
        with held_up(ckpt):
            ckpt.restore({"w": array})
        return np.array_equal(array.get(), np.arange(COUNT))


class Uploading:
    """One chunk of twos on its way to an array, by the device alone."""

    def __init__(self, array: Any) -> None:
        self.device = CudaDevice(0)
        self._slot = Arena(self.device.host_memory(AREAS * area_nbytes(CHUNK)), CHUNK).take()
        self.gate = Gate(self.device._stream.stream)
        self.device.begin_uploads(CHUNK)
        target = look(array, "w")
        assert target is not None
        upload = self.device.upload([Piece(array.nbytes, 1, 0, (target,))], self._slot)
        upload.rooms[0][0].view(np.uint32)[...] = 2
        self.transfer = upload.start()

    def end(self) -> None:
        self.transfer.wait()
        self.gate.join()
        cp.cuda.Device().synchronize()


def read_behind_uploads() -> bool:
    """The caller's stream reads what was uploaded, without a wait on the host."""
    array, out, reader = filled(1, FEW // 4), filled(0, FEW // 4), new_stream()
    uploading = Uploading(array)
    with reader:
        uploading.device.finish_uploads()
        out += array
        reader.synchronize()
    uploading.end()
    return bool((out.get() == 2).all())


def drop_behind_upload() -> bool:
    """What is uploaded to is dropped, and its memory wanted by another stream."""
    other = new_stream()
    filled(1, FEW // 4)
    uploading = Uploading(filled_on(other, 1, FEW // 4))
    again = filled_on(other, 9, FEW // 4)
    uploading.end()
    return bool((again.get() == 9).all())


def restore_after_a_failed_save() -> bool:
    """Copies to the host that a failed save began may still arrive in slots that it gave back."""
    store, array = FullStore(), filled(1)
    with checkpoints(store, "hold", memory=SLOTS) as ckpt:
        ckpt.save(1, {"w": array}).result(60)
        array += np.uint32(1)
        store.full = True
        with held_up_from(ckpt, 2):  # the first two arrive, and can't be written
            ckpt.save(2, {"w": array})
            failed = isinstance(failure_of(ckpt), gpuckpt.StorageError)
            restored = not fails_to_restore(ckpt, {"w": array})
        return failed and restored and bool((array.get() == 1).all())


def restore_after_a_refusal(snapshot: str, marks: int) -> bool:
    """Half of what a download consists of was begun before the device refused the other half."""
    store, array = MemoryStore(), filled(1, FEW)
    with checkpoints(store, snapshot, memory=LEAST) as ckpt, ckpt.update():
        ckpt.save(1, {"w": array}).result(60)
        array += np.uint32(1)
        cp.cuda.Device().synchronize()
        with held_up(ckpt):
            standin.fail("cuEventRecord", error=1, after=marks)
            ckpt.save(2, {"w": array})
            failed = isinstance(failure_of(ckpt), gpuckpt.DeviceError)
            standin.heal()
            restored = not fails_to_restore(ckpt, {"w": array})
        return failed and restored and bool((array.get() == 1).all())


def restore_after_a_refused_peek(snapshot: str) -> bool:
    """A few bytes were on their way when the device refused to say when they have come."""
    store, array = MemoryStore(), filled(1, FEW)
    master = cp.asarray(np.random.default_rng(1).standard_normal(FEW, np.float32))
    copy = master.astype(np.float16)
    with checkpoints(store, snapshot, memory=LEAST) as ckpt, ckpt.update():
        ckpt.save(1, {"w": array}).result(60)
        array += np.uint32(1)
        cp.cuda.Device().synchronize()
        with held_up(ckpt):
            standin.fail("cuEventRecord", error=1, after=2)
            ckpt.save(2, {"w": array, "copy": copy, "master": master})
            failed = isinstance(failure_of(ckpt), gpuckpt.DeviceError)
            standin.heal()
            restored = not fails_to_restore(ckpt, {"w": array})
        return failed and restored and bool((array.get() == 1).all())


def restore_after_a_refused_upload() -> bool:
    """Half of what an upload consists of was begun before the device refused the other half."""
    store, array, other = MemoryStore(), filled(1, FEW // 4), new_stream()
    with checkpoints(store, "copy") as ckpt:
        ckpt.save(1, {"w": array}).result(60)
        target = filled_on(other, 2, FEW // 4)
        address = target.data.ptr
        with held_up(ckpt):
            standin.fail("cuEventRecord", error=1, after=1)  # that of the transfer
            failed = fails_to_restore(ckpt, {"w": target})
            standin.heal()
            del target
            gc.collect()
            again = filled_on(other, 9, FEW // 4)
        assert again.data.ptr == address
        return failed and has_all_slots(ckpt) and bool((again.get() == 9).all())


def drop_behind_a_failed_restore() -> bool:
    """Uploads of a restore that failed may still arrive in memory that is another array's."""
    store, stream, other = LateStore(), new_stream(), new_stream()
    array = filled_on(other, 1)
    address = array.data.ptr
    with checkpoints(store, "copy") as ckpt:
        ckpt.save(1, {"w": array}).result(60)
        (name, store.late), *_ = chunk_places(store)
        store.files[name][store.late] ^= 1
        with held_up(ckpt):
            with stream:
                failed = fails_to_restore(ckpt, {"w": array})
            del array
            gc.collect()
            again = filled_on(other, 9)
            for _ in range(20):  # a thread that has just ended may hold its last frame's array
                if again.data.ptr == address:
                    break
                del again
                time.sleep(0.01)
                gc.collect()
                again = filled_on(other, 9)
        assert again.data.ptr == address
        return failed and has_all_slots(ckpt) and bool((again.get() == 9).all())


def fails_to_restore(ckpt: gpuckpt.Checkpointer, state: Any) -> bool:
    """In a frame of its own, so that no traceback keeps the state."""
    try:
        ckpt.restore(state)
    except (gpuckpt.CorruptError, gpuckpt.DeviceError, gpuckpt.MismatchError):
        return True
    return False


def slots_come_back_from_a_restore() -> bool:
    store, array = MemoryStore(), filled(1, FEW)
    with checkpoints(store, "copy") as ckpt:
        ckpt.save(1, {"w": array}).result(60)
        ckpt.restore({"w": array})
        return has_all_slots(ckpt)


def slots_come_back_if_targets_overlap() -> bool:
    """A restore that looks at its targets once more, since they share memory."""
    store, array = MemoryStore(), filled(1, FEW)
    with checkpoints(store, "copy") as ckpt:
        ckpt.save(1, {"w": array, "half": array[: FEW // 2]}).result(60)
        ckpt.restore({"w": array, "half": array[: FEW // 2]})
        return has_all_slots(ckpt)


def slots_come_back_if_an_upload_is_refused() -> bool:
    store, array = MemoryStore(), filled(1, FEW)
    with checkpoints(store, "copy") as ckpt:
        ckpt.save(1, {"w": array}).result(60)
        fault = standin.fail("cuMemcpyAsync", error=1)
        failed = fails_to_restore(ckpt, {"w": array})
        standin.heal()
        assert fault.struck == 1
        return failed and has_all_slots(ckpt)
