"""What hasn't changed isn't written again, and stays as long as a checkpoint names it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.commit import open_step
from gpuckpt.layout import segment_step
from gpuckpt.resources import Resources
from gpuckpt.stores.memory import MemoryAppender, MemoryStore
from gpuckpt.verify import verify_step
from tests.saving import save

CHUNK = 4096


def numbers(seed: int, count: int = 3000) -> Any:
    return np.random.default_rng(seed).standard_normal(count, np.float32)


def checkpoints(store: MemoryStore, **options: Any) -> gpuckpt.Checkpointer:
    defaults: dict[str, Any] = {"memory": "1 MiB", "chunk_nbytes": CHUNK, "snapshot": "hold"}
    return gpuckpt.Checkpointer("", store=store, **(defaults | options))


def segments_of(store: MemoryStore, step: int) -> set[int | None]:
    """The steps for which the segments that a manifest names were written."""
    return {segment_step(name) for name in open_step(store, step).segments}


def is_right(store: MemoryStore, step: int, state: dict[str, Any]) -> bool:
    found = gpuckpt.load("", step, store=store, memory="64 MiB")
    whole = verify_step(store, step, Resources("1 MiB", chunk_nbytes=CHUNK)) == []
    return whole and all(found[name].tobytes() == state[name].tobytes() for name in state)


def test_only_the_chunks_that_have_changed_are_written():
    store, state = MemoryStore(), {"a": numbers(1), "b": numbers(2)}
    with checkpoints(store) as ckpt:
        first = save(ckpt, 1, state)
        state["b"][2000] += 1
        second = save(ckpt, 2, state)
    assert first.unchanged_nbytes == 0
    assert first.written_nbytes == first.encoded_nbytes
    assert second.unchanged_nbytes == 2 * 12000 - CHUNK
    assert 0 < second.written_nbytes <= CHUNK
    assert second.encoded_nbytes == open_step(store, 2).encoded_nbytes
    assert segments_of(store, 2) == {1, 2}
    assert is_right(store, 2, state)


def test_what_older_checkpoints_wrote_stays_while_a_newer_one_names_it():
    store, state = MemoryStore(), {"frozen": numbers(1, 30000), "w": numbers(2)}
    with checkpoints(store, keep=gpuckpt.Keep(last=1)) as ckpt:
        for step in range(1, 6):
            state["w"] += np.float32(1)
            save(ckpt, step, state)
    assert {segment_step(name) for name in store.names()} - {None} == {1, 5}
    assert is_right(store, 5, state)


def test_each_checkpoint_has_files_of_its_own_if_each_is_to_be_full():
    store, state = MemoryStore(), {"frozen": numbers(1), "w": numbers(2)}
    with checkpoints(store, full_every=1) as ckpt:
        save(ckpt, 1, state)
        state["w"] += np.float32(1)
        assert save(ckpt, 2, state).unchanged_nbytes == 0
    assert segments_of(store, 2) == {2}


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "8"])
def test_a_number_of_checkpoints_until_a_full_one_is_a_positive_integer(number):
    with pytest.raises(gpuckpt.InvalidError, match="full_every"):
        checkpoints(MemoryStore(), full_every=number)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(b=state.pop("a")),
        lambda state: state.update(a=state["a"].view(np.int32)),
        lambda state: state.update(a=state["a"][::-1].copy()),
    ],
    ids=["renamed", "another type", "moved bytes"],
)
def test_a_tensor_that_is_another_one_is_written(change):
    store, state = MemoryStore(), {"a": numbers(1)}
    with checkpoints(store) as ckpt:
        save(ckpt, 1, state)
        change(state)
        assert save(ckpt, 2, state).unchanged_nbytes == 0
    assert is_right(store, 2, state)


def test_a_tensor_that_grows_keeps_what_it_had():
    store, state = MemoryStore(), {"a": numbers(1, 2048)}
    with checkpoints(store) as ckpt:
        save(ckpt, 1, state)
        state["a"] = np.concatenate([state["a"], numbers(2, 1024)])
        assert save(ckpt, 2, state).unchanged_nbytes == 2 * CHUNK
    assert is_right(store, 2, state)


def test_a_resumed_run_refers_to_the_checkpoint_it_resumed_from():
    store, state = MemoryStore(), {"a": numbers(1), "b": numbers(2)}
    with checkpoints(store) as ckpt:
        save(ckpt, 1, state)
        state["a"] += np.float32(1)
        save(ckpt, 2, state)
    with checkpoints(store) as ckpt:
        ckpt.restore(state, 1)
        assert save(ckpt, 3, state).unchanged_nbytes == 24000
    assert segments_of(store, 3) == {1}
    assert is_right(store, 3, {"a": numbers(1), "b": numbers(2)})


def test_what_somebody_deleted_is_written_again():
    store, state = MemoryStore(), {"a": numbers(1)}
    with checkpoints(store) as ckpt:
        save(ckpt, 1, state)
        for name in store.names():
            if segment_step(name) is not None:
                store.remove(name)
        save(ckpt, 2, state)
    assert is_right(store, 2, state)


def test_a_segment_that_is_mostly_out_of_use_goes():
    store, state = MemoryStore(), {f"w{at}": numbers(at) for at in range(10)}
    with checkpoints(store, keep=gpuckpt.Keep(last=1)) as ckpt:
        for step in range(1, 20):
            state[f"w{step % 9}"] += np.float32(1)
            save(ckpt, step, state)
            named = open_step(store, step).encoded_nbytes
            held = sum(store.size(name) for name in store.names() if segment_step(name))
            assert held <= 2.5 * named
    assert 1 not in segments_of(store, 19)
    assert is_right(store, 19, state)


class FullStore(MemoryStore):
    """A store that is full from some point on."""

    full = False

    def create(self, name: str) -> MemoryAppender:
        if self.full:
            raise gpuckpt.StorageError("the disk is full")
        return super().create(name)


def test_a_save_that_failed_is_none_to_refer_to():
    store, state = FullStore(), {"a": numbers(1), "b": numbers(2)}
    with checkpoints(store) as ckpt:
        save(ckpt, 1, state)
        state["a"] += np.float32(1)
        store.full = True
        with pytest.raises(gpuckpt.StorageError):
            ckpt.save(2, state).result(60)
        with pytest.raises(gpuckpt.StorageError):
            ckpt.wait()
        store.full = False
        assert save(ckpt, 3, state).unchanged_nbytes == 12000
    assert segments_of(store, 3) == {1, 3}
    assert is_right(store, 3, state)


KEEPS = [None, gpuckpt.Keep(last=1), gpuckpt.Keep(last=3), gpuckpt.Keep(every=3)]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 5), max_size=6), min_size=1, max_size=12),
    st.sampled_from(KEEPS),
    st.sampled_from(["copy", "hold"]),
    st.sampled_from(["auto", "raw", "zstd"]),
)
def test_every_checkpoint_that_is_kept_is_whole_whatever_changes_and_goes(
    changes, keep, snapshot, codec
):
    store, states = MemoryStore(), {}
    state = {f"w{at}": numbers(at, 1500 + 300 * at) for at in range(6)}
    with checkpoints(store, keep=keep, snapshot=snapshot, codec=codec) as ckpt:
        for step, changed in enumerate(changes, 1):
            with ckpt.update():
                for at in changed:
                    state[f"w{at}"][step] += np.float32(1)
            save(ckpt, step, state)
            states[step] = {name: array.copy() for name, array in state.items()}
        kept = ckpt.steps()
    named = {name for step in kept for name in open_step(store, step).segments}
    assert {name for name in store.names() if segment_step(name) is not None} == named
    assert all(is_right(store, step, states[step]) for step in kept)
