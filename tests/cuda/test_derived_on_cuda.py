"""Copies of masters in a GPU's memory: what follows from others isn't written."""

from __future__ import annotations

from typing import Any

import cupy
import ml_dtypes
import numpy as np
import pytest

import gpuckpt
from gpuckpt.commit import open_step
from gpuckpt.resources import Resources
from gpuckpt.stores.memory import MemoryStore
from gpuckpt.verify import verify_step

CHUNK = 128 << 10  # a leaf of what it is rounded to
HALVES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


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
        "", store=store, snapshot=snapshot, chunk_nbytes=CHUNK, memory="64 MiB", **options
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


def mixed(put: Any, half: Any) -> dict[str, Any]:
    """A frozen master of three chunks and another one, both with copies; a moment."""
    rng, state = np.random.default_rng(2), dict[str, Any]()
    for name in ("frozen", "w"):
        master = rng.standard_normal(3 * CHUNK // 4, np.float32)
        state |= {f"{name}.copy": put(master.astype(half)), f"{name}.master": put(master)}
    return state | {"moment": put(rng.standard_normal(3 * CHUNK // 4, np.float32))}


def nudge(state: dict[str, Any], put: Any, half: Any, part: slice, seed: int) -> None:
    """Change a part of a master a little, and round it anew."""
    master = state["w.master"]
    host = np.array(master.get() if isinstance(master, cupy.ndarray) else master)
    steps = np.random.default_rng(seed).random(host[part].size) < 0.02
    host[part].view(np.uint32)[...] += steps.astype(np.uint32) << 14
    state["w.master"][...] = put(host)
    state["w.copy"].view(np.uint16)[...] = put(host.astype(half).view(np.uint16))


def rows(store: MemoryStore, step: int) -> dict[str, list[tuple[Any, ...]]]:
    """What a step says of each chunk, wherever it lies."""
    return {
        entry.spec.name: [
            (c.fingerprint, c.checksum, c.planes, len(c.chain), [s.fingerprint for s in c.sources])
            for c in entry.chunks
        ]
        for entry in open_step(store, step).tensors
    }


PARTS = {
    "all of it": slice(None),
    "two chunks and so one of its copy": slice(0, CHUNK // 2),
    "half of what a chunk of its copy is rounded from": slice(0, CHUNK // 4),
    "the other half": slice(CHUNK // 4, CHUNK // 2),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("snapshot", ["copy", "hold"])
@pytest.mark.parametrize("dtype", HALVES)
def test_copies_stay_derived_while_of_their_masters_little_is_brought(dtype, snapshot, part):
    """Differences that the GPU takes, and chunks that stand still, hide no master."""
    half, found = HALVES[dtype], []
    for put in (cupy.asarray, np.asarray):
        store, state = MemoryStore(), mixed(put, half)
        with checkpoints(store, snapshot, codec="delta") as ckpt:
            for step in range(1, 6):
                with ckpt.update():
                    if step > 1:
                        nudge(state, put, half, PARTS[part], step)
                pending = ckpt.save(step, state)
                pending.result(60)
                assert (pending.stats.delta_nbytes > 0) == (step > 1)
                wanted = {name: bytes_of(array) for name, array in state.items()}
                loaded = gpuckpt.load("", device="cpu", store=store, memory="64 MiB")
                assert {name: bytes_of(array) for name, array in loaded.items()} == wanted
                assert verify_step(store, step, Resources("8 MiB", chunk_nbytes=CHUNK)) == []
            if put is cupy.asarray:
                assert (ckpt._resources.bases.nbytes == 0) == (snapshot == "copy")
        found.append([rows(store, step) for step in range(1, 6)])
    assert found[0] == found[1]
    for said in found[0]:
        assert all(sources for name in said if "copy" in name for *_, sources in said[name])


@pytest.mark.parametrize("dtype", HALVES)
def test_what_hasnt_changed_isnt_brought_to_be_rounded(dtype):
    store, state = MemoryStore(), mixed(cupy.asarray, HALVES[dtype])
    with checkpoints(store, "copy", codec="delta") as ckpt:
        for step in (1, 2):
            pending = ckpt.save(step, state)
            pending.result(60)
    assert pending.stats.brought_nbytes == 0
    nudge(state, cupy.asarray, HALVES[dtype], slice(0, CHUNK // 4), 3)
    with checkpoints(store, "copy") as ckpt:
        ckpt.save(3, state).result(60)
        nudge(state, cupy.asarray, HALVES[dtype], slice(0, CHUNK // 4), 4)
        pending = ckpt.save(4, state)
        pending.result(60)
    # Both chunks of the master, of which one has changed, and one of the copy.
    assert pending.stats.brought_nbytes == 3 * CHUNK
    assert pending.stats.derived_nbytes == CHUNK


def test_a_copy_of_which_the_master_has_not_moved_with_it_is_stored():
    store, state = MemoryStore(), mixed(cupy.asarray, np.float16)
    with checkpoints(store, "copy", codec="delta") as ckpt:
        for step in range(1, 5):
            if step > 1:
                state["w.copy"].view(np.uint16)[::700] += np.uint16(1)
            ckpt.save(step, state).result(60)
            wanted = {name: bytes_of(array) for name, array in state.items()}
            found = gpuckpt.load("", device="cpu", store=store, memory="64 MiB")
            assert {name: bytes_of(array) for name, array in found.items()} == wanted
    assert all(not sources for *_, sources in rows(store, 4)["w.copy"])
    assert all(sources for *_, sources in rows(store, 4)["frozen.copy"])
