"""Differences that are taken on the GPU: few bytes cross, and what is written is as the host's."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import cupy
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.bases import FEWEST_NBYTES
from gpuckpt.commit import open_step
from gpuckpt.devices.cuda import CudaDevice
from gpuckpt.resources import Resources
from gpuckpt.spec import ChunkEntry
from gpuckpt.stores import Store
from gpuckpt.stores.memory import MemoryStore
from gpuckpt.verify import verify_step
from tests.cuda.held import FullStore

CHUNK = FEWEST_NBYTES
DTYPES = ["u1", "f2", "f4", "f8", "c8", "i8"]
SIZE = 2 * CHUNK + 8 * 40


def numbers(seed: int, dtype: str, nbytes: int = SIZE) -> Any:
    """Numbers as weights are: of all signs, some orders of magnitude."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(nbytes // np.dtype(dtype).itemsize) * 20).astype(dtype)


def nudge(state: dict[str, Any], seed: int, share: float, kind: Any) -> None:
    """Change some elements by one unit of their last place."""
    for at, (name, array) in enumerate(state.items()):
        if name.startswith("frozen"):
            continue
        width = 4 if array.dtype == np.complex64 else array.dtype.itemsize
        words = array.view(f"u{width}").reshape(-1)
        steps = np.random.default_rng([seed, at]).random(words.size) < share
        words += kind.asarray(steps.astype(words.dtype))


def state_of(kind: Any, seed: int = 1) -> dict[str, Any]:
    state = {
        f"w.{dtype}": kind.asarray(numbers(at + seed, dtype)) for at, dtype in enumerate(DTYPES)
    }
    state["frozen"] = kind.asarray(numbers(99 + seed, "f4"))
    state["small"] = kind.asarray(numbers(98 + seed, "f4", 4000))
    state["matrix"] = kind.asarray(numbers(97 + seed, "f4", 4 * 150 * 140)).reshape(150, 140).T
    return state


def checkpoints(store: Any, **options: Any) -> gpuckpt.Checkpointer:
    defaults: dict[str, Any] = {"memory": "8 MiB", "chunk_nbytes": CHUNK, "codec": "delta"}
    return gpuckpt.Checkpointer("", store=store, **(defaults | {"snapshot": "copy"} | options))


def save(ckpt: gpuckpt.Checkpointer, step: int, state: Any) -> gpuckpt.Stats:
    with ckpt.update():
        pass
    pending = ckpt.save(step, state)
    pending.result(60)
    return pending.stats


def known(state: dict[str, Any]) -> dict[str, bytes]:
    return {
        name: (array.get() if isinstance(array, cupy.ndarray) else array).tobytes()
        for name, array in state.items()
    }


def loaded(store: Store, step: int | None = None) -> dict[str, bytes]:
    found = gpuckpt.load("", step, "cpu", store=store)
    return {name: array.tobytes() for name, array in found.items()}


def chunks_of(store: Store, step: int) -> list[ChunkEntry]:
    return [chunk for entry in open_step(store, step).tensors for chunk in entry.chunks]


def said(entries: list[ChunkEntry]) -> list[tuple[Any, ...]]:
    return [(c.start, c.fingerprint, c.checksum, c.planes, len(c.chain)) for c in entries]


@pytest.mark.parametrize("share", [0.003, 0.1, 0.6])
def test_what_is_written_is_what_the_host_would_write(share):
    stores = []
    for kind in (cupy, np):
        store, state = MemoryStore(), state_of(kind)
        stores.append(store)
        with checkpoints(store) as ckpt:
            for step in range(1, 5):
                nudge(state, step, share, kind)
                stats = save(ckpt, step, state)
                assert (ckpt._resources.bases.nbytes == 0) == (kind is cupy)
                assert (stats.delta_nbytes > 0) == (step > 1)
    for step in range(1, 5):
        assert said(chunks_of(stores[0], step)) == said(chunks_of(stores[1], step))
    assert loaded(stores[0]) == loaded(stores[1]) == known(state)


def test_little_crosses_of_what_differs_little():
    store, state = MemoryStore(), state_of(cupy)
    with checkpoints(store) as ckpt:
        assert save(ckpt, 1, state).brought_nbytes == sum(a.nbytes for a in state.values())
        for step in range(2, 5):
            nudge(state, step, 0.01, cupy)
            stats = save(ckpt, step, state)
            changed = stats.raw_nbytes - stats.unchanged_nbytes
            small = changed - stats.delta_nbytes
            assert 0 < stats.brought_nbytes - small < 0.16 * stats.delta_nbytes
            assert small < 0.1 * changed
            assert loaded(store) == known(state)
    assert verify_step(store, 4, Resources("8 MiB", chunk_nbytes=CHUNK)) == []


def test_chunks_that_share_a_slot_come_each_in_their_own_way():
    """Those that don't compress are joined in the slot, where differences have come to."""
    rng = np.random.default_rng(1)
    store = MemoryStore()
    state = {f"{at:02}.w": cupy.asarray(numbers(at, "f4", CHUNK + 64 * at)) for at in range(32)}
    with checkpoints(store, memory="64 MiB", chunk_nbytes=1 << 20) as ckpt:
        for step in range(1, 5):
            stats = save(ckpt, step, state)
            assert loaded(store) == known(state)
            nudge(state, step, 0.02, cupy)
            for at in range(step % 2, 32, 2 + step % 3):
                noise = rng.integers(0, 256, state[f"{at:02}.w"].nbytes, np.uint8)
                state[f"{at:02}.w"].view(np.uint8).set(noise)
    assert 0 < stats.delta_nbytes < stats.raw_nbytes - stats.unchanged_nbytes


def test_after_so_many_a_chunk_is_whole_again_and_then_a_base():
    store, state = MemoryStore(), {"w": cupy.asarray(numbers(1, "f4"))}
    with checkpoints(store, full_every=3) as ckpt:
        for step in range(1, 9):
            nudge(state, step, 0.01, cupy)
            stats = save(ckpt, step, state)
            longest = max(len(chunk.chain) for chunk in chunks_of(store, step))
            assert longest == (step - 1) % 3 + 1
            assert (stats.delta_nbytes == 0) == (longest == 1)
            assert loaded(store) == known(state)


def test_a_failed_save_is_no_base():
    store, state = FullStore(), state_of(cupy)
    with checkpoints(store, on_error="warn") as ckpt:
        save(ckpt, 1, state)
        nudge(state, 1, 0.01, cupy)
        store.full = True
        with pytest.raises(gpuckpt.StorageError):
            save(ckpt, 2, state)
        store.full = False
        nudge(state, 2, 0.01, cupy)
        with pytest.warns(RuntimeWarning, match="step 2"):
            stats = save(ckpt, 3, state)
        assert stats.delta_nbytes == 0
        assert loaded(store) == known(state)
        nudge(state, 3, 0.01, cupy)
        assert save(ckpt, 4, state).delta_nbytes > 0
        assert loaded(store) == known(state)


def test_a_copy_that_nobody_looked_at_is_no_base(monkeypatch):
    """Its memory had another copy before, whose chunks are what is on the disk."""
    store, state = MemoryStore(), {"w": cupy.asarray(numbers(1, "f4"))}
    with checkpoints(store, on_error="warn") as ckpt:
        save(ckpt, 1, state)
        save(ckpt, 2, state)
        with monkeypatch.context() as patched:
            patched.setattr(import_module("gpuckpt.save"), "stage", refuse)
            nudge(state, 1, 0.01, cupy)
            with pytest.raises(gpuckpt.StorageError):
                save(ckpt, 3, state)
        nudge(state, 2, 0.01, cupy)
        with pytest.warns(RuntimeWarning, match="step 3"):
            assert save(ckpt, 4, state).delta_nbytes == 0
        assert loaded(store) == known(state)


def refuse(*_: Any) -> Any:
    """Nothing is staged."""
    raise gpuckpt.StorageError("refused")


def test_after_a_restore_the_last_copy_is_a_base_where_it_is_what_is_on_the_disk():
    store, state = MemoryStore(), state_of(cupy)
    with checkpoints(store) as ckpt:
        save(ckpt, 1, state)
        nudge(state, 1, 0.01, cupy)
        save(ckpt, 2, state)
        ckpt.restore(state, 1)
        nudge(state, 2, 0.01, cupy)
        assert save(ckpt, 3, state).delta_nbytes == 0
        assert loaded(store) == known(state)
        ckpt.restore(state, 3)
        nudge(state, 3, 0.01, cupy)
        assert save(ckpt, 4, state).delta_nbytes > 0
        assert loaded(store) == known(state)


def test_another_state_has_bases_of_its_own():
    store = MemoryStore()
    with checkpoints(store, memory="24 MiB") as ckpt:
        for step, names in enumerate(["ab", "ab", "b", "b", "abc", "abc"], 1):
            state = {name: cupy.asarray(numbers(ord(name), "f4")) for name in names}
            nudge(state, step, 0.01, cupy)
            assert (save(ckpt, step, state).delta_nbytes > 0) == (step % 2 == 0)
            assert loaded(store) == known(state)


def test_where_a_device_has_no_room_the_host_keeps_the_bases(monkeypatch):
    store, state = MemoryStore(), state_of(cupy)
    monkeypatch.setattr(CudaDevice, "free_nbytes", lambda _: 3 << 20)
    with checkpoints(store) as ckpt:
        for step in (1, 2):
            nudge(state, step, 0.01, cupy)
            stats = save(ckpt, step, state)
            assert stats.mode == "copy"
        assert ckpt._resources.bases.nbytes > 0
        assert stats.delta_nbytes > 0
        assert stats.brought_nbytes == stats.raw_nbytes - stats.unchanged_nbytes
        assert loaded(store) == known(state)


def test_where_nobody_has_room_chunks_are_whole(monkeypatch, caplog):
    store, state = MemoryStore(), state_of(cupy)
    monkeypatch.setattr(CudaDevice, "free_nbytes", lambda _: 3 << 20)
    with checkpoints(store, memory="2 MiB") as ckpt:
        for step in (1, 2):
            nudge(state, step, 0.01, cupy)
            stats = save(ckpt, step, state)
        assert stats.delta_nbytes == 0
    assert "no deltas" in caplog.text
    assert loaded(store) == known(state)


def test_memory_for_two_copies_is_taken_once_and_told():
    store, state = MemoryStore(), state_of(cupy)
    with checkpoints(store) as ckpt:
        first = save(ckpt, 1, state).copy_nbytes
        assert first > 2 * sum(array.nbytes for array in state.values())
        for step in (2, 3):
            nudge(state, step, 0.01, cupy)
            assert save(ckpt, step, state).copy_nbytes == first


@pytest.mark.parametrize("options", [{"full_every": 1}, {"codec": "auto"}, {"snapshot": "hold"}])
def test_who_wants_no_deltas_of_copies_pays_no_memory_for_them(options):
    state = state_of(cupy)
    with checkpoints(MemoryStore(), **options) as ckpt:
        nbytes = sum(array.nbytes for array in state.values())
        assert save(ckpt, 1, state).copy_nbytes < 2 * nbytes


def test_bfloat16_has_the_hosts_differences_too():
    stores = []
    for kind in (cupy, np):
        store = MemoryStore()
        stores.append(store)
        state = {"w": kind.asarray(numbers(1, "f4").astype(ml_dtypes.bfloat16))}
        with checkpoints(store) as ckpt:
            for step in (1, 2):
                nudge(state, step, 0.02, kind)
                stats = save(ckpt, step, state)
        assert stats.delta_nbytes > 0
        assert loaded(store) == known(state)
    assert said(chunks_of(stores[0], 2)) == said(chunks_of(stores[1], 2))


@settings(max_examples=15, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from([0, 0.001, 0.1, 0.9]), st.booleans()), min_size=2, max_size=6
    ),
    full_every=st.sampled_from([2, 8]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_run_comes_back_at_every_step(steps, full_every, seed):
    store, state, history = MemoryStore(), state_of(cupy, seed), {}
    with checkpoints(store, full_every=full_every) as ckpt:
        for step, (share, restores) in enumerate(steps, 1):
            nudge(state, seed + step, share, cupy)
            save(ckpt, step, state)
            history[step] = known(state)
            if restores:
                back = seed % step + 1
                ckpt.restore(state, back)
                assert known(state) == history[back]
    for step, expected in history.items():
        assert loaded(store, step) == expected
