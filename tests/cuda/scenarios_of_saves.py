"""Saves that go wrong if one wait, one order or one reference is missing.

Each scenario says whether all was right.
"""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import cupy as cp
import numpy as np

import gpuckpt
from gpuckpt.commit import open_step
from gpuckpt.statistics import Statistics
from gpuckpt.stores.memory import MemoryStore
from tests.cuda.gates import Gate
from tests.cuda.held import (
    CHUNK,
    COUNT,
    FEW,
    LEAST,
    SLOTS,
    Float8,
    StuckStore,
    checkpoints,
    filled,
    filled_on,
    frozen_of,
    goes_on,
    held_up,
    is_saved,
    new_stream,
    torch_on,
)


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


def save_behind_torch() -> bool:
    """Another library's current stream still has to make the state when it is saved."""
    store, stream, array = MemoryStore(), new_stream(), filled(1)
    with checkpoints(store, "copy") as ckpt:
        gate = Gate(stream)
        with stream:
            array += np.uint32(1)
        with torch_on(stream):
            ckpt.save(1, {"w": array}).result(60)
        gate.join()
        cp.cuda.Device().synchronize()
    return is_saved(store, 2)


def update_behind_save(snapshot: str, count: int = COUNT, **options: Any) -> bool:
    """Updates on another stream are ready to run while the state can't be read yet, twice."""
    store, stream, array = MemoryStore(), new_stream(), filled(1, count)
    with checkpoints(store, snapshot, **options) as ckpt:
        for step in (1, 2):
            with ckpt.update(), held_up(ckpt):
                pending = ckpt.save(step, {"w": array})
                with stream, ckpt.update():
                    array += np.uint32(1)
                stream.synchronize()
                pending.result(60)
    return all(is_saved(store, step, step) for step in (1, 2))


def save_behind_a_save() -> bool:
    """A second save would write to the copy that the first one is still being read from."""
    store, array, slow = MemoryStore(), filled(1), StuckStore()
    with checkpoints(slow, "copy", memory=LEAST) as ckpt:
        ckpt.save(1, {"w": array})
        assert slow.reached.wait(30)
        array += np.uint32(1)
        threading.Timer(0.1, slow.freed.set).start()
        ckpt.save(2, {"w": array}).result(60)
    store.files.update(slow.files)
    return is_saved(store, 1) and is_saved(store, 2, 2)


def update_unannounced(snapshot: str) -> bool:
    """A loop without `update` goes on, on the stream on which it saved."""
    store, stream, array = MemoryStore(), new_stream(), filled(1)
    with checkpoints(store, snapshot) as ckpt, held_up(ckpt), stream:
        pending = ckpt.save(1, {"w": array})
        array += np.uint32(1)
        stream.synchronize()
        pending.result(60)
    return is_saved(store, 1)


def update_when_staged(snapshot: str) -> bool:
    """Nothing is read any more once `staged` is set, so nothing has to be announced."""
    store, stream, array = MemoryStore(), new_stream(), filled(1)
    with checkpoints(store, snapshot) as ckpt, ckpt.update(), held_up(ckpt):
        pending = ckpt.save(1, {"w": array})
        assert pending.staged.wait(30)
        with stream:
            array += np.uint32(1)
        stream.synchronize()
        pending.result(60)
    return is_saved(store, 1)


def update_behind_given_reads() -> bool:
    """All reads have been given to the device when the update comes, and none was made."""
    store, stream, array = MemoryStore(), new_stream(), filled(1, FEW)
    with checkpoints(store, "hold", memory=SLOTS) as ckpt, ckpt.update(), held_up(ckpt):
        pending = ckpt.save(1, {"w": array})
        assert frozen_of(ckpt)._ended.wait(30)
        with stream, ckpt.update():
            array += np.uint32(1)
        stream.synchronize()
        pending.result(60)
    return is_saved(store, 1)


def update_on_the_host_goes_on() -> bool:
    """The host waits no longer than until the reads have been given."""
    store, array = MemoryStore(), filled(1, FEW)
    gc.collect()  # freeing page-locked memory would make the host wait
    with (
        checkpoints(store, "hold", memory=SLOTS) as ckpt,
        ckpt.update(),
        held_up(ckpt, 2) as gate,
    ):
        pending = ckpt.save(1, {"w": array})
        with new_stream(), ckpt.update():
            early = not gate.is_open
        gate.open()
        pending.result(60)
    return early


def staged_while_the_disk_is_stuck(snapshot: str, **options: Any) -> bool:
    """The state is the caller's again, to be changed or dropped, though nothing was written.

    A copy needs no more for this than memory on the device; what is held must
    fit the slots, or have host memory of its own.
    """
    store, count = StuckStore(), FEW if options.get("memory") == SLOTS else COUNT
    with checkpoints(store, snapshot, **options) as ckpt, ckpt.update():
        return _is_staged(ckpt, store, {"w": filled(1, count)})


def staged_when_its_slots_are_full() -> bool:
    """The second looks, which have been made, would wait for a slot to be seen."""
    store = StuckStore()
    store.freed.set()
    with checkpoints(store, "hold") as ckpt, ckpt.update():
        ckpt.save(1, {"w": filled(1, FEW)}).result(60)
        store.freed.clear()
        arena = ckpt._resources._arena
        assert arena is not None
        return _is_staged(ckpt, store, {"w": filled(1, arena.count * CHUNK // 4)})


def _is_staged(ckpt: gpuckpt.Checkpointer, store: StuckStore, state: dict[str, Any]) -> bool:
    pending, alive = ckpt.save(2, state), weakref.ref(state["w"])
    state.clear()
    right = pending.staged.wait(5) and alive() is None
    store.freed.set()
    return right and pending.result(60).step == 2


def update_while_the_disk_is_stuck() -> bool:
    """What has host memory of its own is read at once: an update waits for no slot."""
    store, stream, array = StuckStore(), new_stream(), filled(1)
    with checkpoints(store, "hold") as ckpt, ckpt.update():
        pending = ckpt.save(1, {"w": array})

        def update() -> None:
            with stream, ckpt.update():
                array.__iadd__(np.uint32(1))

        right = goes_on(update)
        store.freed.set()
        pending.result(60)
    stream.synchronize()
    return right and is_saved(store, 1)


def differences_of_copies() -> bool:
    """Each copy differs from the one before in more places than that one did."""
    store, right = MemoryStore(), True
    array = cp.asarray(np.random.default_rng(1).integers(0, 2**32, COUNT, np.uint32))
    with checkpoints(store, "copy", codec="delta") as ckpt:
        for step in range(1, 5):
            with ckpt.update():
                array[:: 640 >> 2 * step] += np.uint32(1)
            pending = ckpt.save(step, {"w": array})
            pending.result(60)
            right = right and (step == 1 or pending.stats.delta_nbytes == array.nbytes)
            found = gpuckpt.load("", step, "cpu", store=store)["w"]
            right = right and bool((found == array.get()).all())
    return right


def drop_behind_save(snapshot: str) -> bool:
    """The state's memory goes to another array of another stream, if it may."""
    store, other = MemoryStore(), new_stream()
    filled(1)
    with checkpoints(store, snapshot) as ckpt, ckpt.update(), held_up(ckpt):
        array = filled_on(other, 1)
        pending = ckpt.save(1, {"w": array})
        del array
        again = filled_on(other, 9)
        pending.result(60)
    del again
    return is_saved(store, 1)


def update_behind_hold_of_host_arrays() -> bool:
    """The host's arrays are read while the disk has room for them."""
    store, array = StuckStore(), np.full(COUNT, 1, np.uint32)
    with checkpoints(store, "hold", memory=LEAST) as ckpt, ckpt.update():
        pending = ckpt.save(1, {"w": array})
        threading.Timer(0.1, store.freed.set).start()
        with ckpt.update():
            array += np.uint32(1)
        pending.result(60)
    return is_saved(store, 1)


def drop_behind_hold_of_host_arrays() -> bool:
    """The host's arrays live as long as they are read, and no longer."""
    store, array = StuckStore(), np.full(COUNT, 1, np.uint32)
    with checkpoints(store, "hold", memory=LEAST) as ckpt, ckpt.update():
        pending, alive = ckpt.save(1, {"w": array}), weakref.ref(array)
        del array
        kept = alive() is not None
        store.freed.set()
        assert pending.staged.wait(30)
        pending.result(60)
    return kept and alive() is None


def tables_of_another_device() -> bool:
    """A type's values are on their way while memory is freed for another device."""
    store = MemoryStore()
    with cp.cuda.Device(1):
        ones = filled(0x38383838, FEW // 4)
    state = {"w": Float8(ones.view(np.uint8))}
    with checkpoints(store, "copy") as ckpt:
        ckpt.save(1, {"w": ones}).result(60)
        with held_up(ckpt, device=1):
            pending = ckpt.save(2, state)
            gc.collect()
            pending.result(60)
    (tensor,) = open_step(store).tensors
    return tensor.statistics == Statistics(0, 0, float(ones.nbytes))


def tables_are_the_streams_own() -> bool:
    """Memory that the caller gave back, and still writes to, isn't used for a type's values."""
    store, stream = MemoryStore(), new_stream()
    ones = filled(0x38383838, FEW // 4)  # four ones in float8_e4m3fn
    with stream:
        filled(1, 256)
        block = cp.empty(256, np.float32)
        gate = Gate(stream)
        block.fill(3.0)
        del block
        with checkpoints(store, "copy") as ckpt:
            pending = ckpt.save(1, {"w": Float8(ones.view(np.uint8))})
            gate.join()
            pending.result(60)
    (tensor,) = open_step(store).tensors
    return tensor.statistics == Statistics(0, 0, float(ones.nbytes))
