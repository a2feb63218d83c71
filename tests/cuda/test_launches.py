"""How much work a save and a restore give the device: by slots, not by tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cupy as cp
import numpy as np
import pytest

import gpuckpt
from gpuckpt.arena import Arena
from gpuckpt.stores.memory import MemoryStore
from tests.cuda_on_cpu import standin

CHUNK = 1 << 20
TENSORS, LARGE, STRIDED = 3000, 3, 48
MOST = 10  # kernels and copies for each slot


class Taken:
    """How many slots were taken so far."""

    count = 0


@pytest.fixture
def slots(monkeypatch) -> Taken:
    taken, take = Taken(), Arena.take

    def take_and_count(self: Arena) -> Any:
        taken.count += 1
        return take(self)

    monkeypatch.setattr(Arena, "take", take_and_count)
    return taken


@pytest.fixture
def state(standin_settings) -> Iterator[dict[str, Any]]:
    if standin_settings is None:
        pytest.skip("only the stand-in counts")
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 500, TENSORS).tolist() + [CHUNK // 2] * LARGE
    values = cp.asarray(rng.standard_normal(sum(lengths), np.float32))
    edges = np.cumsum([0, *lengths]).tolist()
    state = {f"w{at}": values[edges[at] : edges[at + 1]].copy() for at in range(len(lengths))}
    square = cp.asarray(rng.standard_normal((STRIDED, 40, 50), np.float32))
    state |= {f"t{at}": square[at].T for at in range(STRIDED)}
    cp.cuda.Device().synchronize()
    yield state
    cp.cuda.Device().synchronize()


def checkpoints(store: MemoryStore, snapshot: str, codec: str = "auto") -> gpuckpt.Checkpointer:
    return gpuckpt.Checkpointer("", store=store, snapshot=snapshot, codec=codec, chunk_nbytes=CHUNK)


def change(ckpt: gpuckpt.Checkpointer, state: dict[str, Any]) -> None:
    with ckpt.update():
        state["w7"] += np.float32(1)
        for at in range(TENSORS, TENSORS + LARGE):
            state[f"w{at}"][::50] *= np.float32(1 + 1e-6)


@pytest.mark.parametrize("codec", ["auto", "delta"])
@pytest.mark.parametrize("snapshot", ["copy", "hold"])
def test_a_save_launches_by_slots_and_the_caller_waits_for_nothing(state, slots, snapshot, codec):
    with checkpoints(MemoryStore(), snapshot, codec) as ckpt:
        for step in (1, 2):  # with differences two copies take turns
            change(ckpt, state)
            ckpt.save(step, state).result(120)
        change(ckpt, state)
        taken = slots.count
        with standin.counting() as whole:
            with standin.counting() as call:
                pending = ckpt.save(3, state)
            pending.result(120)
    assert (pending.stats.delta_nbytes > 0) == (codec == "delta")
    taken = slots.count - taken
    work = whole.total["launch"] + whole.total["copy"]
    assert 0 < work <= MOST * taken
    assert work < TENSORS / 10
    assert call.current["host_sync"] == 0
    assert call.current["launch"] <= 2
    assert call.current["copy"] == 0  # of the arrays' addresses, which the device has
    assert memory_of(whole) == {"alloc": 0, "free": 0, "host_alloc": 0, "host_free": 0}


@pytest.mark.parametrize("snapshot", ["copy", "hold"])
def test_an_update_gives_the_device_at_most_an_order(state, snapshot):
    with checkpoints(MemoryStore(), snapshot) as ckpt:
        change(ckpt, state)
        ckpt.save(1, state).result(120)
        change(ckpt, state)
        pending = ckpt.save(2, state)
        with standin.counting() as call, ckpt.update():
            pass
        pending.result(120)
    orders = ("stream_wait", "event_record")
    assert not any(n for name, n in call.current.items() if name not in orders)
    assert sum(call.current[name] for name in orders) <= len(orders)


def test_a_restore_launches_by_slots(state, slots):
    with checkpoints(MemoryStore(), "copy") as ckpt:
        ckpt.save(1, state).result(120)
        ckpt.restore(state)
        taken = slots.count
        with standin.counting() as whole:
            ckpt.restore(state)
    taken = slots.count - taken
    work = whole.total["launch"] + whole.total["copy"]
    assert 0 < work <= MOST * taken
    assert work < TENSORS / 5
    assert whole.current["host_sync"] == 0
    assert memory_of(whole) == {"alloc": 0, "free": 0, "host_alloc": 0, "host_free": 0}


def memory_of(counting: standin.Counting) -> dict[str, int]:
    return {name: counting.total[name] for name in ("alloc", "free", "host_alloc", "host_free")}
