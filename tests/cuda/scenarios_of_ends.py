"""Saves that are refused, stuck or slow: updates go on, slots come back, nobody waits for ever."""

from __future__ import annotations

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
    checkpoints,
    failure_of,
    filled,
    goes_on,
    has_all_slots,
    is_saved,
    new_stream,
    no_threads,
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


def slots_come_back_if_refused(snapshot: str, call: str, after: int, **options: Any) -> bool:
    """A download, or a second look, can't be begun."""
    store, array = MemoryStore(), filled(1, FEW)
    with checkpoints(store, snapshot, **options) as ckpt, ckpt.update():
        ckpt.save(1, {"w": array}).result(60)
        array += np.uint32(1)
        cp.cuda.Device().synchronize()
        fault = standin.fail(call, error=1, after=after)
        ckpt.save(2, {"w": array})
        failure = failure_of(ckpt)
        standin.heal()
        assert fault.struck == 1
        return isinstance(failure, gpuckpt.DeviceError) and has_all_slots(ckpt)


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
