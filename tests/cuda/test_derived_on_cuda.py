"""Copies of masters in a GPU's memory: what follows from others isn't written."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np
import pytest

import gpuckpt
from gpuckpt.resources import Resources
from gpuckpt.stores.memory import MemoryStore
from gpuckpt.verify import verify_step

CHUNK = 128 << 10  # a leaf of what it is rounded to


def new_state(put: Any) -> dict[str, Any]:
    """Masters, copies of two types, and moments of the same shapes."""
    rng, state = np.random.default_rng(1), {}
    for at, shape in enumerate(((300, 200), (300, 200), (5000,), (120, 800))):
        w = rng.standard_normal(shape, np.float32)
        state[f"half.{at}"] = put(w.astype(np.float16))
        state[f"moment.{at}"] = put(w * w)
        state[f"master.{at}"] = put(w)
    return state


def bytes_of(array: Any) -> bytes:
    return bytes((array.get() if isinstance(array, cupy.ndarray) else array).tobytes())


def checkpoints(store: MemoryStore, snapshot: str, **options: Any) -> gpuckpt.Checkpointer:
    return gpuckpt.Checkpointer(
        "", store=store, snapshot=snapshot, chunk_nbytes=CHUNK, memory="8 MiB", **options
    )


@pytest.mark.parametrize("codec", ["auto", "raw", "delta"])
@pytest.mark.parametrize("snapshot", ["copy", "hold"])
def test_copies_on_a_gpu_are_derived_and_come_back_on_either_device(snapshot, codec):
    store, state = MemoryStore(), new_state(cupy.asarray)
    copies = sum(array.nbytes for name, array in state.items() if name.startswith("half"))
    with checkpoints(store, snapshot, codec=codec) as ckpt:
        for step in range(1, 4):
            with ckpt.update():
                for at in range(4):
                    state[f"master.{at}"] += np.float32(1e-3)
                    state[f"half.{at}"][...] = state[f"master.{at}"].astype(np.float16)
            pending = ckpt.save(step, state)
            pending.result(60)
            assert pending.stats.derived_nbytes == copies
        wanted = {name: bytes_of(array) for name, array in state.items()}
        for device in (None, "cpu"):
            found = gpuckpt.load("", device=device, store=store, memory="64 MiB")
            assert {name: bytes_of(array) for name, array in found.items()} == wanted
        for array in state.values():
            array[...] = 0
        ckpt.restore(state)
        assert {name: bytes_of(array) for name, array in state.items()} == wanted
    assert verify_step(store, 3, Resources("8 MiB", chunk_nbytes=CHUNK)) == []


@pytest.mark.parametrize("snapshot", ["copy", "hold"])
def test_both_devices_derive_the_same(snapshot):
    found = []
    for put in (cupy.asarray, np.asarray):
        store = MemoryStore()
        with checkpoints(store, snapshot) as ckpt:
            ckpt.save(1, new_state(put)).result(60)
        manifest = gpuckpt.commit.open_step(store, 1)
        found.append([[c.sources != () for c in entry.chunks] for entry in manifest.tensors])
    assert found[0] == found[1]


@pytest.mark.parametrize("snapshot", ["copy", "hold"])
def test_a_copy_of_a_master_that_lies_strided_comes_back(snapshot):
    rng, store = np.random.default_rng(1), MemoryStore()
    master = cupy.asarray(rng.standard_normal((300, 200), np.float32)).T
    state = {"master": master, "half": cupy.ascontiguousarray(master).astype(np.float16)}
    with checkpoints(store, snapshot) as ckpt:
        pending = ckpt.save(1, state)
        pending.result(60)
    assert pending.stats.derived_nbytes == (state["half"].nbytes if snapshot == "copy" else 0)
    found = gpuckpt.load("", store=store, memory="64 MiB")
    assert {name: bytes_of(array) for name, array in found.items()} == {
        name: bytes_of(array) for name, array in state.items()
    }
