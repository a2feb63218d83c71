"""Saves of what a state differs by from the one before, and the way back."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.bases import FEWEST_NBYTES, Bases
from gpuckpt.commit import open_step
from gpuckpt.entries import CHAIN_MAX
from gpuckpt.fingerprint import fingerprint
from gpuckpt.increments import CHAIN_SHARE, Before
from gpuckpt.plan import make_plans
from gpuckpt.resources import Resources
from gpuckpt.spec import Chunk, ChunkEntry, Extent, Plane, Spec
from gpuckpt.stores import Store
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.memory import MemoryStore
from gpuckpt.verify import verify_step
from tests.shares import share_of

CHUNK = FEWEST_NBYTES
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int8, np.complex64, np.int64]


def checkpoints(store: Any, **options: Any) -> gpuckpt.Checkpointer:
    defaults: dict[str, Any] = {"memory": "8 MiB", "chunk_nbytes": CHUNK, "codec": "delta"}
    return gpuckpt.Checkpointer("", store=store, **(defaults | options))


def numbers(seed: int, dtype: Any = np.float32, nbytes: int = 2 * CHUNK + 320) -> Any:
    count = nbytes // np.dtype(dtype).itemsize
    return (np.random.default_rng(seed).standard_normal(count) * 20).astype(dtype)


def nudge(array: Any, seed: int, share: float = 0.1) -> None:
    """Change some elements by a little, in place: as bit patterns, which any dtype has."""
    width = 4 if array.dtype == np.complex64 else array.dtype.itemsize
    words = array.view(f"u{width}")
    rng = np.random.default_rng(seed)
    words += (rng.random(words.size) < share).astype(words.dtype)


def save(ckpt: gpuckpt.Checkpointer, step: int, state: Any) -> gpuckpt.Stats:
    with ckpt.update():
        pass
    pending = ckpt.save(step, state)
    pending.result(60)
    return pending.stats


def chunks_of(store: Store, step: int) -> list[ChunkEntry]:
    return [chunk for entry in open_step(store, step).tensors for chunk in entry.chunks]


def is_right(store: Store, step: int, state: dict[str, Any]) -> bool:
    found = gpuckpt.load("", step, store=store, memory="64 MiB")
    whole = verify_step(store, step, Resources("8 MiB", chunk_nbytes=CHUNK)) == []
    return whole and all(found[name].tobytes() == state[name].tobytes() for name in state)


@pytest.mark.parametrize("snapshot", ["copy", "hold"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_what_changes_a_little_is_saved_as_what_it_differs_by(dtype, snapshot):
    store, state = MemoryStore(), {"w": numbers(1, dtype)}
    with checkpoints(store, snapshot=snapshot) as ckpt:
        first = save(ckpt, 1, state)
        before = {"w": state["w"].copy()}
        nudge(state["w"], 1)
        second = save(ckpt, 2, state)
    assert first.delta_nbytes == 0
    assert second.delta_nbytes >= 2 * CHUNK
    assert second.written_nbytes < first.written_nbytes / 3
    assert is_right(store, 1, before)
    assert is_right(store, 2, state)


def test_a_state_that_is_another_one_is_saved_whole():
    store, state = MemoryStore(), {"w": numbers(1)}
    with checkpoints(store) as ckpt:
        save(ckpt, 1, state)
        state["w"][:] = numbers(2)
        assert save(ckpt, 2, state).delta_nbytes == 0
    assert is_right(store, 2, state)


@pytest.mark.parametrize("full_every", [1, 2, 4])
def test_chains_end_where_they_are_to(full_every):
    store, state, lengths = MemoryStore(), {"w": numbers(1, ml_dtypes.bfloat16)}, []
    with checkpoints(store, full_every=full_every) as ckpt:
        for step in range(1, 10):
            save(ckpt, step, state)
            lengths.append(len(chunks_of(store, step)[0].chain))
            nudge(state["w"], step, 0.01)
    expected = [at % full_every + 1 for at in range(9)]
    assert lengths == expected


def test_a_delta_that_is_smaller_than_what_says_where_it_is_goes_on_with_its_chain():
    store, state, lengths = MemoryStore(), {"w": numbers(1)}, []
    with checkpoints(store) as ckpt:
        for step in range(1, 5):
            save(ckpt, step, state)
            lengths.append(len(chunks_of(store, step)[0].chain))
            state["w"][7] += np.float32(1)
    assert lengths == [1, 2, 3, 4]


def test_a_chain_never_takes_much_more_than_twice_the_state_to_read():
    store, state = MemoryStore(), {"w": numbers(1)}
    rng = np.random.default_rng(5)
    with checkpoints(store, full_every=50) as ckpt:
        for step in range(1, 12):
            save(ckpt, step, state)
            for chunk in chunks_of(store, step):
                read = sum(link.extent.length for link in chunk.chain)
                assert read <= 1.05 * CHAIN_SHARE * chunk.nbytes
            state["w"] *= (1 + rng.standard_normal(state["w"].size) * 1e-5).astype(np.float32)
    lengths = [len(chunks_of(store, step)[0].chain) for step in range(1, 12)]
    assert 3 <= max(lengths) < 8
    assert lengths.count(1) > 1


def test_no_chain_is_longer_than_a_reader_follows():
    planes, extent = (Plane("raw", 1),) * 4, Extent("s", 64, 4)
    entry = ChunkEntry(0, 4, extent, "0" * 32, "1" * 16, planes)
    for links in range(1, CHAIN_MAX + 2):
        base = Before([{0: entry}], full_every=1000).base(Chunk(0, 0, 4))
        assert (base is None) == (links >= CHAIN_MAX)
        entry = ChunkEntry(0, 4, extent, "0" * 32, "1" * 16, planes, entry)


def test_without_room_for_the_state_before_saves_are_whole_and_the_log_says_why(caplog):
    store, state = MemoryStore(), {"w": numbers(1, nbytes=8 << 20)}
    with checkpoints(store, memory="2 MiB", snapshot="hold") as ckpt:
        save(ckpt, 1, state)
        nudge(state["w"], 1)
        assert save(ckpt, 2, state).delta_nbytes == 0
    assert is_right(store, 2, state)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "raise memory" in caplog.text


def test_a_copy_that_was_asked_for_comes_before_deltas(caplog):
    store, state = MemoryStore(), {"w": numbers(1, nbytes=8 << 20)}
    with checkpoints(store, memory="12 MiB", snapshot="copy") as ckpt:
        assert save(ckpt, 1, state).copy_nbytes >= 8 << 20
        nudge(state["w"], 1)
        assert save(ckpt, 2, state).delta_nbytes == 0
    assert is_right(store, 2, state)
    assert "raise memory" in caplog.text
    with checkpoints(MemoryStore(), memory="24 MiB", snapshot="copy") as ckpt:
        save(ckpt, 1, state)
        nudge(state["w"], 1)
        assert save(ckpt, 2, state).delta_nbytes == 8 << 20


def test_a_resumed_run_begins_with_what_is_whole():
    store, state = MemoryStore(), {"w": numbers(1)}
    with checkpoints(store) as ckpt:
        save(ckpt, 1, state)
    with checkpoints(store) as ckpt:
        ckpt.resume(state)
        nudge(state["w"], 1)
        assert save(ckpt, 2, state).delta_nbytes == 0
        nudge(state["w"], 2)
        assert save(ckpt, 3, state).delta_nbytes > 0
    assert is_right(store, 3, state)


def test_what_is_taken_back_to_an_older_step_is_no_delta_of_a_later_one():
    store, state = MemoryStore(), {"w": numbers(1)}
    with checkpoints(store) as ckpt:
        save(ckpt, 1, state)
        nudge(state["w"], 1)
        save(ckpt, 2, state)
        ckpt.restore(state, 1)
        nudge(state["w"], 3)
        assert save(ckpt, 3, state).delta_nbytes == 0
    assert is_right(store, 3, state)


def test_bases_outlive_the_checkpoints_that_wrote_them():
    store, state = MemoryStore(), {"w": numbers(1, ml_dtypes.bfloat16)}
    with checkpoints(store, keep=gpuckpt.Keep(last=1)) as ckpt:
        for step in range(1, 6):
            save(ckpt, step, state)
            nudge(state["w"], step, 0.01)
        nudge(state["w"], 5, 0)
        state["w"][:] = gpuckpt.load("", store=store, memory="64 MiB")["w"]
    assert len(chunks_of(store, 5)[0].chain) == 5
    assert len(open_step(store, 5).segments) == 5
    assert is_right(store, 5, state)


def test_damage_in_a_base_is_found_and_named(tmp_path):
    store, state = LocalStore(tmp_path), {"w": numbers(1)}
    with checkpoints(store) as ckpt:
        save(ckpt, 1, state)
        nudge(state["w"], 1)
        save(ckpt, 2, state)
    chunk = chunks_of(store, 2)[0]
    base = chunk.chain[1].extent
    with (tmp_path / base.segment).open("r+b") as file:
        file.seek(base.offset + 5)
        wrong = bytes([file.read(1)[0] ^ 1])
        file.seek(base.offset + 5)
        file.write(wrong)
    (damage,) = verify_step(store, 2, Resources("8 MiB", chunk_nbytes=CHUNK))
    assert (damage.tensor, damage.file) == ("w", chunk.extent.segment)
    assert base.segment in damage.reason
    with pytest.raises(gpuckpt.CorruptError, match=base.segment):
        gpuckpt.load(tmp_path, 2, memory="64 MiB")


def test_a_data_file_of_deltas_is_read_with_those_of_its_bases(tmp_path):
    state = {"w": numbers(1)}
    options: dict[str, Any] = {"codec": "delta", "memory": "8 MiB", "chunk_nbytes": CHUNK}
    with gpuckpt.Checkpointer(tmp_path, **options) as ckpt:
        save(ckpt, 1, state)
        nudge(state["w"], 1)
        save(ckpt, 2, state)
    (file,) = tmp_path.glob("step-000000000002.*.segment")
    assert gpuckpt.load(file)["w"].tobytes() == state["w"].tobytes()
    (base,) = tmp_path.glob("step-000000000001.*.segment")
    base.unlink()
    with pytest.raises(gpuckpt.NotFoundError, match=base.name):
        gpuckpt.load(file)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.dictionaries(st.integers(0, 3), st.sampled_from((0.0, 0.001, 0.1, 0.9)), max_size=4),
            st.sampled_from(("save", "save", "save", "restore", "reopen")),
        ),
        min_size=2,
        max_size=9,
    ),
    st.sampled_from([None, gpuckpt.Keep(last=1), gpuckpt.Keep(every=2)]),
    st.sampled_from(["copy", "hold"]),
    st.integers(1, 5),
)
def test_every_checkpoint_of_a_run_of_deltas_is_whole(changes, keep, snapshot, full_every):
    store, states = MemoryStore(), {}
    kinds = [np.float32, ml_dtypes.bfloat16, np.uint8, np.float64]
    state = {f"w{at}": numbers(at, kind, CHUNK * (at + 1)) for at, kind in enumerate(kinds)}
    options = {"keep": keep, "snapshot": snapshot, "full_every": full_every, "memory": "16 MiB"}
    ckpt = checkpoints(store, **options)
    for step, (changed, then) in enumerate(changes, 1):
        with ckpt.update():
            for at, share in changed.items():
                nudge(state[f"w{at}"], step, share)
        save(ckpt, step, state)
        states[step] = {name: array.copy() for name, array in state.items()}
        if then == "restore":
            ckpt.restore(state, ckpt.steps()[0])
        if then == "reopen":
            ckpt.close()
            ckpt = checkpoints(store, **options)
            ckpt.resume(state)
    kept = ckpt.steps()
    ckpt.close()
    assert all(is_right(store, step, states[step]) for step in kept)


def test_a_base_that_somebody_changed_meanwhile_is_none():
    spec = Spec("w", "uint8", (CHUNK,))
    plans = make_plans([spec], [(1,)], {"cpu": [0]}, chunk_nbytes=CHUNK, split=True)
    (chunk,) = plans["cpu"].batches[0]
    bases, raw = Bases(), numbers(1, np.uint8, CHUNK)
    bases.prepare(plans, CHUNK - 1)
    bases.put(chunk, [raw], fingerprint(raw.data))
    assert bases.get(chunk, fingerprint(raw.data)) is None
    bases.prepare(make_plans([spec], [(1,)], {"cpu": [0]}, chunk_nbytes=CHUNK, split=True), CHUNK)
    known = fingerprint(raw.data)
    bases.put(chunk, [raw], known)
    assert bases.get(chunk, known) is not None
    assert bases.get(chunk, "0" * 32) is None
    before = raw.copy()
    raw[7] += 1
    bases.put(chunk, [raw], "0" * 32)
    assert bases.get(chunk, "0" * 32) is None
    assert bases.get(chunk, known) is None
    bases.put(chunk, [before], known)
    found = bases.get(chunk, known)
    assert found is not None
    assert found.tobytes() == before.tobytes()


def test_bases_that_an_interrupt_kept_from_being_made_are_made_the_next_time(monkeypatch):
    spec = Spec("w", "uint8", (CHUNK,))
    plans = make_plans([spec], [(1,)], {"cpu": [0]}, chunk_nbytes=CHUNK, split=True)
    bases, empty = Bases(), np.empty

    def interrupted(size: int, dtype: Any) -> Any:
        if size:
            raise KeyboardInterrupt
        return empty(size, dtype)

    monkeypatch.setattr("gpuckpt.bases.np.empty", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bases.prepare(plans, CHUNK)
    monkeypatch.undo()
    bases.prepare(plans, CHUNK)
    assert bases.nbytes == CHUNK


def test_a_larger_arena_takes_the_place_of_bases_within_the_budget():
    spec = Spec("w", "uint8", (40 << 20,))
    plans = make_plans([spec], [(1,)], {"cpu": [0]}, chunk_nbytes=1 << 20, split=True)
    resources = Resources("64 MiB", chunk_nbytes=1 << 20)
    small = resources.arena(["cpu"])
    resources.bases.prepare(plans, resources.host_room_nbytes)
    assert small.nbytes + resources.bases.nbytes <= 64 << 20
    assert resources.bases.nbytes == 40 << 20
    large = resources.arena(["cpu"], 8 << 20)
    assert large.nbytes + resources.bases.nbytes <= 64 << 20


def test_a_copy_that_no_longer_fits_is_let_go_of_for_a_hold():
    device = Resources("64 MiB").devices["cpu"]
    share = share_of(device, [numbers(1)])
    share.freeze(copy=True).release()
    assert device.kept_nbytes > 0
    share.freeze(copy=False).release()
    assert device.kept_nbytes == 0
