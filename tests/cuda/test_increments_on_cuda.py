"""What hasn't changed, and what has changed a little, of arrays in a GPU's memory."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np
import pytest

import gpuckpt
from gpuckpt.bases import FEWEST_NBYTES
from gpuckpt.commit import open_step
from gpuckpt.resources import Resources
from gpuckpt.stores.memory import MemoryStore
from gpuckpt.verify import verify_step

CHUNK = FEWEST_NBYTES


def new_state(kind: Any = cupy) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    numbers = rng.standard_normal((2, 2 * CHUNK // 4 + 40), np.float32)
    return {
        "frozen": kind.asarray(numbers[0]),
        "w": kind.asarray(numbers[1]),
        "t": kind.asarray(rng.standard_normal((130, 140), np.float32)).T,
        "host": numbers[0].copy(),
    }


def change(state: dict[str, Any]) -> None:
    state["w"][::50] += np.float32(1e-3)
    state["t"][5] *= np.float32(1 + 1e-6)
    state["host"][::50] += np.float32(1e-3)


def checkpoints(store: MemoryStore, snapshot: str) -> gpuckpt.Checkpointer:
    return gpuckpt.Checkpointer(
        "", store=store, snapshot=snapshot, codec="delta", chunk_nbytes=CHUNK, memory="8 MiB"
    )


def bytes_of(array: Any) -> bytes:
    return bytes((array.get() if isinstance(array, cupy.ndarray) else array).tobytes())


@pytest.mark.parametrize("snapshot", ["copy", "hold"])
def test_increments_come_back_bit_for_bit_on_either_device(snapshot):
    store, state = MemoryStore(), new_state()
    with checkpoints(store, snapshot) as ckpt:
        for step in range(1, 5):
            with ckpt.update():
                change(state)
            pending = ckpt.save(step, state)
            pending.result(60)
            if step > 1:
                assert pending.stats.unchanged_nbytes >= state["frozen"].nbytes
                assert pending.stats.delta_nbytes >= 4 * CHUNK
        wanted = {name: bytes_of(array) for name, array in state.items()}
        for device in (None, "cpu"):
            found = gpuckpt.load("", device=device, store=store, memory="64 MiB")
            assert {name: bytes_of(array) for name, array in found.items()} == wanted
        change(state)
        ckpt.restore(state)
        assert {name: bytes_of(array) for name, array in state.items()} == wanted
    assert verify_step(store, 4, Resources("8 MiB", chunk_nbytes=CHUNK)) == []


@pytest.mark.parametrize("snapshot", ["copy", "hold"])
def test_increments_of_both_devices_are_the_same_bytes(snapshot):
    stores = []
    for kind in (cupy, np):
        store, state = MemoryStore(), new_state(kind)
        stores.append(store)
        with checkpoints(store, snapshot) as ckpt:
            for step in range(1, 4):
                with ckpt.update():
                    change(state)
                ckpt.save(step, state).result(60)
    for what in ("planes", "checksum"):
        one, other = (
            [
                [getattr(chunk, what) for chunk in entry.chunks]
                for entry in open_step(store, 3).tensors
            ]
            for store in stores
        )
        assert one == other
