"""Saves that are refused, stuck or slow: updates go on, slots come back, nobody waits for ever."""

from __future__ import annotations

import gc
import threading
from typing import Any
from unittest.mock import patch

import cupy as cp
import numpy as np
import pytest

import gpuckpt
from gpuckpt.stores.memory import MemoryStore
from tests.cuda.gates import Gate
from tests.cuda.held import (
    FEW,
    LEAST,
    FullStore,
    StuckStore,
    checkpoints,
    collected,
    failure_of,
    filled,
    goes_on,
    has_all_slots,
    held_up,
    is_saved,
    new_stream,
    no_threads,
    own_stream,
    patience,
    without_semaphores,
)
from tests.cuda_on_cpu import standin


def slots_come_back(snapshot: str) -> bool:
    store, array = MemoryStore(), filled(1, FEW)
    with checkpoints(store, snapshot) as ckpt:
        ckpt.save(1, {"w": array}).result(60)
        return has_all_slots(ckpt)


def slots_come_back_from_a_full_disk() -> bool:
    store, array = FullStore(), filled(1, FEW)
    store.full = True
    with checkpoints(store, "copy") as ckpt:
        ckpt.save(1, {"w": array})
        return isinstance(failure_of(ckpt), gpuckpt.StorageError) and has_all_slots(ckpt)


def slots_come_back_if_refused(snapshot: str, call: str, after: int) -> bool:
    """A download, or a second look, can't be begun."""
    store, array = MemoryStore(), filled(1, FEW)
    with checkpoints(store, snapshot) as ckpt, ckpt.update():
        ckpt.save(1, {"w": array}).result(60)
        array += np.uint32(1)
        cp.cuda.Device().synchronize()
        fault = standin.fail(call, error=1, after=after)
        ckpt.save(2, {"w": array})
        failure = failure_of(ckpt)
        standin.heal()
        assert fault.struck == 1
        return isinstance(failure, gpuckpt.DeviceError) and has_all_slots(ckpt)


def update_goes_on_if_it_cannot_be_opened() -> bool:
    """The device refuses to write the value for which the caller's stream waits."""
    store, stream, array = MemoryStore(), new_stream(), filled(1)
    with checkpoints(store, "hold", memory=LEAST) as ckpt, ckpt.update():
        with held_up(ckpt):
            fault = standin.fail("cuStreamWriteValue32", error=1, times=9)
            ckpt.save(1, {"w": array})
            with stream, ckpt.update():
                array += np.uint32(1)
        failure = failure_of(ckpt)
        standin.heal()
        assert fault.struck
        return isinstance(failure, gpuckpt.DeviceError) and goes_on(stream.synchronize)


def update_goes_on_though_garbage_is_collected() -> bool:
    """Page-locked memory is freed in a thread of the save's, for which an update waits."""
    store, stream, array = MemoryStore(), new_stream(), filled(1)
    with checkpoints(store, "hold", memory=LEAST) as ckpt, ckpt.update(), collected(stream):
        garbage: list[Any] = [ckpt._resources.devices["cuda:0"].host_memory(1)]
        garbage.append(garbage)
        del garbage
        with held_up(ckpt):
            ckpt.save(1, {"w": array})
            with stream, ckpt.update():
                array += np.uint32(1)
        right = goes_on(stream.synchronize) and failure_of(ckpt) is None
    return right and is_saved(store, 1)


def update_goes_on_without_threads(named: str) -> bool:
    """No thread can be had for the save, whose reads therefore never begin."""
    store, stream, array = MemoryStore(), new_stream(), filled(1)
    with checkpoints(store, "hold", memory=LEAST) as ckpt, no_threads(named) as shows:
        with ckpt.update():
            ckpt.save(1, {"w": array})
        threading.Timer(0.1, shows.set).start()
        with stream, ckpt.update():
            shows.set()
        return isinstance(failure_of(ckpt), RuntimeError) and goes_on(stream.synchronize)


def update_goes_on_though_one_before_is_let_go_late() -> bool:
    """What lets the update of a good save go on comes after that of a save that could not begin."""
    store, stream, array = MemoryStore(), new_stream(), filled(1)
    with checkpoints(store, "hold", memory=LEAST) as ckpt:
        ckpt.save(1, {"w": array}).result(60)
        with ckpt.update():
            gate = Gate(stream)
        with no_threads("gpuckpt-work") as shows:
            ckpt.save(2, {"w": array})
            with stream, ckpt.update():
                shows.set()
            failed = isinstance(failure_of(ckpt), RuntimeError)
        own_stream(ckpt).synchronize()
        gate.join()
        return failed and goes_on(stream.synchronize)


def save_goes_on_without_threads_and_semaphores() -> bool:
    """The same where the host waits."""
    right: list[bool] = []
    with without_semaphores():
        ended = goes_on(lambda: right.append(update_goes_on_without_threads("gpuckpt-work")))
    return ended and right == [True]


def a_busy_caller_is_waited_for() -> bool:
    """What the caller's stream did before the snapshot may take longer than patience lasts."""
    store, stream, array = MemoryStore(), new_stream(), filled(1)
    with patience(0.3), checkpoints(store, "hold", memory=LEAST) as ckpt, ckpt.update(), stream:
        gate = Gate(stream, 1.0)
        ckpt.save(1, {"w": array})
        with ckpt.update():
            array += np.uint32(1)
        failure = failure_of(ckpt)
        stream.synchronize()
        gate.join()
    return failure is None and is_saved(store, 1)


def a_save_right_after_another() -> bool:
    """Whoever watched over the first must have no hand in the second, which takes longer."""
    store, stream, array = MemoryStore(), new_stream(), filled(1)
    with patience(0.3), checkpoints(store, "hold", memory=LEAST) as ckpt, ckpt.update():
        for step, seconds in ((1, 0.0), (2, 1.0)):
            with held_up(ckpt, seconds):
                ckpt.save(step, {"w": array})
                with stream, ckpt.update():
                    array += np.uint32(1)
                failed = failure_of(ckpt) is not None
    return not failed and all(is_saved(store, step, step) for step in (1, 2))


def a_slow_disk_is_waited_for() -> bool:
    """An update waits for longer than patience lasts, since there is no slot to read into."""
    store, stream, array = StuckStore(), new_stream(), filled(1)
    with patience(0.3), checkpoints(store, "hold", memory=LEAST) as ckpt, ckpt.update():
        ckpt.save(1, {"w": array})
        with stream, ckpt.update():
            array += np.uint32(1)
        threading.Timer(1.0, store.freed.set).start()
        right = failure_of(ckpt) is None
        stream.synchronize()
    return right and is_saved(store, 1)


def one_queue_for_all_streams() -> bool:
    """What would let the caller go on waits behind it: nothing may hang, the next save works."""
    store, stream, array = MemoryStore(), new_stream(), filled(1)
    with patience(0.5), checkpoints(store, "hold", memory=LEAST) as ckpt, ckpt.update():
        ckpt.save(1, {"w": array})
        with stream, ckpt.update():
            array += np.uint32(1)
        right = isinstance(failure_of(ckpt), gpuckpt.DeviceError) and goes_on(stream.synchronize)
        if right:
            ckpt.save(2, {"w": array})
            with stream, ckpt.update():
                array += np.uint32(1)
            stream.synchronize()
            ckpt.wait()
    return right and ckpt.steps() == [2] and is_saved(store, 2, 2)


def one_queue_and_a_refusal() -> bool:
    """A download is refused whose first steps wait behind the stopped update."""
    store, stream, array = StuckStore(), new_stream(), filled(1)
    with checkpoints(store, "hold", memory=LEAST) as ckpt, ckpt.update():
        ckpt.save(1, {"w": array})
        assert store.reached.wait(30)
        with stream, ckpt.update():
            array += np.uint32(1)
        fault = standin.fail("cuEventRecord", error=1)
        store.freed.set()
        right = goes_on(lambda: isinstance(failure_of(ckpt), gpuckpt.DeviceError))
        standin.heal()
        assert fault.struck == 1
        return right and goes_on(stream.synchronize)


def a_stream_comes_later_than_the_end() -> bool:
    """A stream waits to be let go by a save that ended long ago, and whose checkpointer is gone."""
    store = MemoryStore()
    with cp.cuda.Device(1):
        stream, array = new_stream(), filled(1)
        with checkpoints(store, "hold", memory=LEAST) as ckpt:
            ckpt.save(1, {"w": array}).result(60)
            with ckpt.update():
                array += np.uint32(1)
            gates = [Gate(own_stream(ckpt, "cuda:1")), Gate(stream, 0.5)]
            ckpt.save(2, {"w": array})
            with stream, ckpt.update():
                array += np.uint32(1)
            ckpt.wait()
    del ckpt
    gc.collect()
    with cp.cuda.Device(1):
        right = goes_on(stream.synchronize)
        for gate in gates:
            gate.join()
        return right and bool((array.get() == 3).all())


def a_copy_that_nobody_saves() -> bool:
    """An interrupt drops a copy that is still to be made; the next writes its table over it."""
    store, stream, large = MemoryStore(), new_stream(), filled(1, 8 * FEW)
    with gpuckpt.Checkpointer("", store=store, snapshot="copy") as ckpt:
        ckpt.save(1, {"w": large}).result(60)
        small, other = filled(9, FEW), filled(2, 8 * FEW)
        with stream:
            gate = Gate(stream, 0.7)
            with (
                patch("gpuckpt.saving.BackgroundSave", side_effect=KeyboardInterrupt),
                pytest.raises(KeyboardInterrupt),
            ):
                ckpt.save(2, {"w": other})
            ckpt.save(3, {"w": small}).result(60)
            gate.join()
        cp.cuda.Device().synchronize()
    return is_saved(store, 9, 3)


def a_driver_without(call: str) -> bool:
    """The driver has the calls of a semaphore, and refuses one: updates wait on the host."""
    standin.fail(call, error=801, times=1 << 20)
    store, array = MemoryStore(), filled(1)
    try:
        with checkpoints(store, "hold") as ckpt:
            with ckpt.update():
                pass
            ckpt.save(1, {"w": array})
            with ckpt.update():
                array += np.uint32(1)
            ckpt.wait()
    finally:
        standin.heal()
    return is_saved(store, 1)


def first_device_is_let_go() -> bool:
    """One device's reads have all been given while another's wait for the disk."""
    store, stream, first = StuckStore(), new_stream(), filled(1, FEW // 4)
    with cp.cuda.Device(1):
        second = filled(1)
    with checkpoints(store, "hold", memory=2 * LEAST) as ckpt, ckpt.update():
        pending = ckpt.save(1, {"w": first, "x": second})
        with stream, ckpt.update():
            first += np.uint32(1)
        right = goes_on(stream.synchronize, 5)
        store.freed.set()
        pending.result(60)
    return right and is_saved(store, 1)
