"""Arrays that never change are kept until they are written, and not copied; nobody waits for it."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

import gpuckpt
from gpuckpt.background import BackgroundSave
from gpuckpt.devices.cpu import CpuDevice
from gpuckpt.stores.memory import MemoryStore
from tests.like_jax import Array
from tests.shares import share_of

COUNT = 1 << 16


class Gated(MemoryStore):
    """Writes nothing before the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def create(self, name: str) -> Any:
        assert self.gate.wait(60)
        return super().create(name)


def loaded(store: MemoryStore, name: str = "w") -> Any:
    return gpuckpt.load("", names=name, device="cpu", like="numpy", store=store)[name]


@pytest.mark.parametrize("snapshot", ["copy", "hold", "auto"])
def test_an_array_is_kept_until_it_is_written_and_the_loop_goes_on(snapshot):
    store, full = Gated(), np.arange(COUNT, dtype=np.float32)
    memory = full.copy()
    kept = weakref.ref(memory)
    with gpuckpt.Checkpointer("", store=store, snapshot=snapshot, codec="raw") as ckpt:
        pending = ckpt.save(1, {"w": Array(memory)})
        del memory
        gc.collect()
        assert kept() is not None, "else its memory may be another's by now"
        assert not pending.committed.is_set(), "the loop goes on before it is written"
        with ckpt.update():
            pass
        store.gate.set()
        pending.result(60)
        assert pending.stats.copy_nbytes == 0
        ckpt.wait()
        gc.collect()
        assert kept() is None, "nobody needs it any more"
    assert np.array_equal(loaded(store), full)


def test_what_can_change_beside_it_is_copied():
    store = Gated()
    state: dict[str, Any] = {"w": Array(np.arange(COUNT)), "n": np.zeros(COUNT, np.int8)}
    with gpuckpt.Checkpointer("", store=store, snapshot="copy") as ckpt:
        pending = ckpt.save(1, state)
        state["n"] += 1
        store.gate.set()
        pending.result(60)
        assert pending.stats.copy_nbytes < 2 * COUNT
    assert not loaded(store, "n").any()
    assert np.array_equal(loaded(store), np.arange(COUNT))


def test_what_does_not_lie_in_one_piece_is_copied():
    full = np.arange(2 * COUNT)
    store = MemoryStore()
    with gpuckpt.Checkpointer("", store=store, snapshot="copy") as ckpt:
        pending = ckpt.save(1, {"w": Array(full[::2])})
        pending.result(60)
        assert pending.stats.copy_nbytes >= 8 * COUNT
    assert np.array_equal(loaded(store), full[::2])


@pytest.mark.parametrize("codec", ["raw", "zstd", "auto", "delta"])
def test_every_codec_reads_it_where_it_is(codec):
    store, full = MemoryStore(), np.arange(COUNT, dtype=np.float32)
    with gpuckpt.Checkpointer("", store=store, codec=codec) as ckpt:
        for step in range(3):
            ckpt.save(step, {"w": Array(full + step), "empty": Array(np.empty((0, 3)))})
    assert np.array_equal(loaded(store), full + 2)


def test_one_that_was_donated_is_named():
    leaf = Array(np.arange(3))
    leaf.deleted = True
    with pytest.raises(gpuckpt.UnsupportedError, match=r"layers\.0: .*donated"):
        gpuckpt.save("", {"layers": [leaf]}, store=MemoryStore())


def test_a_chunk_that_has_arrived_keeps_its_memory_though_the_snapshot_was_released():
    memory = np.arange(COUNT, dtype=np.float32)
    kept, expected = weakref.ref(memory), memory.tobytes()
    share = share_of(CpuDevice(), [Array(memory)])
    frozen = share.freeze(copy=True)
    arrived = frozen.download(0, share.new_slot()).wait()
    frozen.release()
    del memory, share, frozen
    gc.collect()
    assert kept() is not None, "a worker may still read it"
    found = b"".join(plane.tobytes() for one in arrived for plane in one.planes)
    assert found
    assert expected.startswith(found)
    del arrived
    gc.collect()
    assert kept() is None


def test_an_update_after_a_save_that_an_interrupt_kept_from_beginning_waits_for_nothing():
    array = np.zeros(COUNT)
    with gpuckpt.Checkpointer("", store=MemoryStore(), snapshot="hold", on_error="warn") as ckpt:
        with ckpt.update():
            pass
        with (
            patch.object(BackgroundSave, "start", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            ckpt.save(1, {"w": array})
        updating = threading.Thread(target=lambda: ckpt.update().__enter__(), daemon=True)
        updating.start()
        updating.join(30)
        assert not updating.is_alive()
        with pytest.warns(RuntimeWarning):
            ckpt.wait()
