"""Disks that are full, broken or gone: what was committed stays, and the next save works.

Each operation of a save fails in turn, first those of the port `Store`, then
the system's calls below `LocalStore`; then real file systems and limits do.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.commit import open_step, steps, writing
from gpuckpt.errors import StorageError
from gpuckpt.layout import manifest_name
from gpuckpt.resources import Resources
from gpuckpt.stores import Store, read_all
from gpuckpt.stores.blocks import ALIGNMENT, Blocks
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.memory import MemoryStore
from gpuckpt.verify import verify_step
from tests.failing_disks import (
    CODES,
    DONE,
    HOWS,
    REFUSED,
    Fault,
    FaultyStore,
    SmallStore,
    System,
    refusal,
)

CHUNK = 64 << 10  # the least of which there are deltas
NOBODY_KNOWS = "may be there all the same"
State = dict[str, Any]


def new_state() -> State:
    random = np.random.default_rng(7)
    return {
        "w": random.standard_normal(20_000, np.float32),
        "frozen": random.standard_normal(9_000, np.float32),
        "step": 0,
    }


def advance(state: State, step: int) -> State:
    """One training step; what the state is then."""
    change = np.random.default_rng(step).standard_normal(20_000, np.float32)
    state["w"] *= 1 + 1e-6 * change
    state["step"] = step
    return {name: np.copy(value) for name, value in state.items()}


def checkpointer(store: Store, **options: Any) -> gpuckpt.Checkpointer:
    least: dict[str, Any] = {"chunk_nbytes": CHUNK, "memory": "8 MiB", "snapshot": "copy"}
    return gpuckpt.Checkpointer("", store=store, **(least | options))


def same(one: State, other: State) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in ("w", "frozen", "step"))


def damage(store: Store, step: int) -> list:
    return list(verify_step(store, step, Resources("32 MiB", chunk_nbytes=4 * CHUNK)))


def check(store: Store, states: dict[int, State]) -> None:
    """Every checkpoint that is there is whole, and the state that was saved."""
    for step in steps(store):
        assert damage(store, step) == []
        assert same(gpuckpt.load("", step, store=store), states[step])


def unnamed(store: Store) -> set[str]:
    """The files that no checkpoint has."""
    found = set(store.names())
    for step in steps(store):
        found -= {manifest_name(step), *open_step(store, step).segments}
    return found


def failure_of(ckpt: gpuckpt.Checkpointer, step: int, state: State) -> StorageError | None:
    """How a save has ended, and all that comes after it."""
    pending = ckpt.save(step, state)
    failure: StorageError | None = None
    try:
        ckpt.wait()
    except StorageError as error:
        failure = error
    assert failure is pending.failure
    return failure


# Each operation of the store in turn


def runs(how: str, **options: Any) -> Iterator[tuple[FaultyStore, Fault, StorageError | None]]:
    """Two saves, one of which an operation fails, and one more: each operation in turn."""
    for at in itertools.count():
        store, state, states = FaultyStore(), new_state(), dict[int, State]()
        fault = Fault(at, CODES[at % len(CODES)], how)
        with checkpointer(store, keep=gpuckpt.Keep(last=2), **options) as ckpt:
            for step in (1, 2):
                states[step] = advance(state, step)
                assert failure_of(ckpt, step, state) is None
            states[3] = advance(state, 3)
            store.fault = fault
            failure = failure_of(ckpt, 3, state)
            store.fault = None
            check(store, states)
            yield store, fault, failure
            states[4] = advance(state, 4)
            assert failure_of(ckpt, 4, state) is None
            assert steps(store)[-1] == 4
            assert unnamed(store) == set()
            check(store, states)
        if not fault.struck:
            return


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    "options",
    [{"codec": "delta"}, {"codec": "raw", "full_every": 1}, {"snapshot": "hold"}],
    ids=lambda options: ", ".join(map(str, options.values())),
)
def test_whatever_operation_fails_the_last_good_checkpoint_stays_and_the_next_save_works(
    how, options
):
    struck = set()
    for store, fault, failure in runs(how, **options):
        struck.add(fault.struck.partition(" ")[0])
        if failure is None:
            assert steps(store)[-2:] == [2, 3]
            continue
        assert str(failure).startswith("step 3 was not saved: ")
        assert fault.struck in str(failure), "the operation and the file"
        if NOBODY_KNOWS in str(failure):
            assert fault.struck.startswith(("rename", "sync the names"))
            continue
        assert failure.errno == fault.code
        assert steps(store) == [1, 2]
        made = fault.struck.startswith("create") and how == DONE
        assert made or unnamed(store) == set(), "its space is given back"
    assert struck >= {"create", "append", "sync", "close", "rename", "remove", "list"}
    assert struck >= {"size", "read"} or options.get("full_every") == 1


def test_a_step_that_is_saved_again_on_a_failing_disk_is_the_old_one_or_the_new_one():
    for at in itertools.count():
        store, state = FaultyStore(), new_state()
        old = advance(state, 1)
        with checkpointer(store) as ckpt:
            ckpt.save(5, state).result()
            new = advance(state, 2)
            store.fault = fault = Fault(at, errno.EIO)
            failure = failure_of(ckpt, 5, state)
            store.fault = None
            found = gpuckpt.load("", store=store)
            assert same(found, new) or (failure is not None and same(found, old))
            assert same(found, old) or failure is None or NOBODY_KNOWS in str(failure)
            assert failure_of(ckpt, 6, state) is None
            assert same(gpuckpt.load("", 6, store=store), new)
            assert damage(store, 5) == []
        with writing(store):
            assert unnamed(store) == set()
        if not fault.struck:
            break


def test_a_run_goes_on_or_stops_as_on_error_says():
    ends = set()
    for at in itertools.count():
        store, state = FaultyStore(), new_state()
        with checkpointer(store, on_error="warn") as ckpt:
            ckpt.save(1, state).result()
            advance(state, 2)
            store.fault = fault = Fault(at, errno.ENOSPC)
            pending = ckpt.save(2, state)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                ckpt.wait()
            store.fault = None
            sentences = [str(one.message) for one in told]
            assert [one.count("step 2 was not saved: ") for one in sentences] == [1] * (
                pending.failure is not None
            )
            ends.add(pending.failure is None)
            ckpt.save(3, state).result()
        if not fault.struck:
            break
    assert ends == {True, False}


@pytest.mark.parametrize("how", [REFUSED, DONE])
def test_whatever_fails_while_a_root_is_taken_is_raised_and_the_root_can_be_taken_then(how):
    raised = set()
    for at in itertools.count():
        store, state = FaultyStore(), new_state()
        gpuckpt.save("", state, 1, store=store)
        store.inner.files["step-000000000002.0badcafe.r0.0.segment"] = bytearray(100)
        store.inner.files[manifest_name(3) + ".tmp"] = bytearray(100)
        store.fault = fault = Fault(at, errno.EIO, how)
        try:
            with writing(store):
                pass
        except StorageError as error:
            assert fault.struck in str(error)  # noqa: PT017 - or it was one that only sweeping needs
            raised.add(fault.struck.partition(" ")[0])
        store.fault = None
        with checkpointer(store) as ckpt:
            assert unnamed(store) == set()
            assert ckpt.resume(new_state()) == 1
        if not fault.struck:
            break
    assert raised == {"lock", "list", "sync", "remove"}


def test_whatever_can_not_be_read_is_raised_and_can_be_read_once_the_disk_works_again():
    state, raised = new_state(), set()
    whole = FaultyStore()
    with checkpointer(whole, codec="delta") as ckpt:
        for step in (1, 2, 3):
            now = advance(state, step)
            ckpt.save(step, state).result()
    for at in itertools.count():
        store = FaultyStore(whole.inner)
        store.fault = fault = Fault(at, errno.EIO)
        try:
            found = gpuckpt.load("", store=store)
        except StorageError as error:
            assert fault.struck in str(error)  # noqa: PT017 - or it is looked for again
            raised.add(fault.struck.partition(" ")[0])
        else:
            assert same(found, now)
        store.fault = None
        assert same(gpuckpt.load("", store=store), now)
        if not fault.struck:
            break
    assert raised == {"list", "size", "read"}


def test_a_disk_that_reports_an_error_is_not_tried_again():
    store, state = FaultyStore(), new_state()
    for step in (1, 2, 3):
        gpuckpt.save("", state, step, store=store)
    with checkpointer(store, keep=gpuckpt.Keep(last=1)) as ckpt:
        before = len(store.operations)
        store.fault = Fault(3, errno.EIO)
        assert failure_of(ckpt, 4, state) is not None
        begun = [one for one in store.operations[before:] if one.startswith("create")]
        assert len(begun) == 1
        assert steps(store) == [1, 2, 3]


fates = st.one_of(
    st.none(), st.tuples(st.integers(0, 30), st.sampled_from(CODES), st.sampled_from(HOWS))
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(fates, min_size=1, max_size=6),
    st.sampled_from(["raw", "auto", "delta"]),
    st.sampled_from([1, 2, 8]),
    st.sampled_from(["copy", "hold"]),
    st.integers(1, 3),
)
def test_any_row_of_saves_and_failures_leaves_whole_checkpoints_and_the_last_that_was_announced(
    fates, codec, full_every, snapshot, last
):
    store, state, states, announced = FaultyStore(), new_state(), dict[int, State](), 0
    options = {"codec": codec, "full_every": full_every, "snapshot": snapshot}
    with checkpointer(store, keep=gpuckpt.Keep(last=last), **options) as ckpt:
        for step, fate in enumerate([*fates, None], 1):
            states[step] = advance(state, step)
            store.fault = Fault(*fate) if fate else None
            if failure_of(ckpt, step, state) is None:
                announced = step
            store.fault = None
            check(store, states)
            assert not announced or announced in steps(store)
        assert announced == len(fates) + 1
        assert unnamed(store) == set()


# Room


def noise(nbytes: int, seed: int = 0) -> dict[str, Any]:
    return {"w": np.frombuffer(np.random.default_rng(seed).bytes(nbytes), np.uint8)}


def saved(store: Store, *sizes: int) -> None:
    """Checkpoints of so many bytes each, made by a run that keeps all."""
    for step, nbytes in enumerate(sizes, 1):
        gpuckpt.save("", noise(nbytes, step), step, store=store)


def test_a_save_that_surely_does_not_fit_is_refused_before_anything_is_written():
    store = SmallStore(300_000)
    saved(store, 200_000)
    before = store.files.copy()
    with checkpointer(store, codec="raw") as ckpt:
        with pytest.raises(
            StorageError, match="step 2 was not saved: memory: at least 150000 "
        ) as e:
            ckpt.save(2, noise(150_000, 2)).result()
        assert f"the disk has {store.left} left; nothing was written: free space" in str(e.value)
        assert e.value.errno == errno.ENOSPC
        with pytest.raises(StorageError):
            ckpt.wait()
        assert store.files == before
        ckpt.save(3, noise(50_000, 3)).result()


def test_a_full_disk_refuses_every_save():
    store = SmallStore(300_000)
    saved(store, 200_000)
    store.nbytes -= store.left
    with pytest.raises(StorageError, match="the disk has 0 left; nothing was written"):
        gpuckpt.save("", {"w": np.zeros(5)}, 2, store=store)


# Chunks of which the rounded ones are whole leaves.
LARGER: dict[str, Any] = {"chunk_nbytes": 4 * CHUNK, "memory": "32 MiB"}


def mixed(scale: float) -> State:
    w = np.random.default_rng(3).standard_normal(40_000, np.float32) * np.float32(scale)
    return {"w": w, "copy": w.astype(np.float16)}


@pytest.mark.parametrize("codec", ["raw", "auto", "zstd", "delta"])
def test_a_save_that_may_turn_out_to_be_small_is_not_refused(codec):
    store = SmallStore(10**9)
    with checkpointer(store, codec=codec, **LARGER) as ckpt:
        ckpt.save(1, mixed(1)).result()
        store.nbytes = sum(map(len, store.files.values())) + 20_000
        ckpt.save(2, mixed(1)).result()  # nothing has changed
        store.nbytes = sum(map(len, store.files.values())) + 175_000
        ckpt.save(3, mixed(2)).result()  # the copy is the other one, rounded
        store.nbytes = sum(map(len, store.files.values())) + 20_000
        if codec != "raw":
            ckpt.save(4, {"new": np.zeros(100_000)}).result()
        ckpt.wait()


def test_tensors_that_may_be_others_rounded_need_no_room():
    store = SmallStore(165_000)
    with checkpointer(store, codec="raw", **LARGER) as ckpt:
        assert ckpt.save(1, mixed(1)).result().raw_nbytes == 240_000


def test_with_little_room_auto_compresses_though_the_loop_leaves_no_core(monkeypatch):
    monkeypatch.setattr("gpuckpt.cores.Cores.left", lambda _: 0.0)
    store, state = SmallStore(100_000), {"w": np.zeros(100_000, np.float32)}
    with checkpointer(store) as ckpt:
        ckpt.save(1, state).result()


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([0.0, 1.0, 2.0]),
    st.integers(0, 300_000),
    st.sampled_from(["raw", "auto", "zstd"]),
    st.sampled_from([{}, {"full_every": 1}, {"snapshot": "hold"}]),
    st.booleans(),
)
def test_no_save_is_refused_that_would_have_fitted(scale, nbytes, codec, options, restored):
    stores = [SmallStore(10**9, says=says) for says in (True, False)]
    for store in stores:
        gpuckpt.save("", mixed(1), 1, store=store, codec="raw")
        store.nbytes -= store.left - nbytes
    ends = []
    for store in stores:
        with checkpointer(store, codec=codec, **LARGER, **options) as ckpt:
            if restored:
                ckpt.restore(mixed(0))
            ends.append(failure_of(ckpt, 2, mixed(scale)) is None)
    assert ends[0] == ends[1]


@pytest.mark.parametrize("codec", ["raw", "auto"])
def test_what_keep_would_not_keep_anyway_makes_room_before_a_save(codec, caplog):
    store = SmallStore(700_000)
    saved(store, 200_000, 200_000, 200_000)
    with checkpointer(store, keep=gpuckpt.Keep(last=2), codec=codec) as ckpt:
        pending = ckpt.save(4, noise(250_000, 4))
        pending.result()
        assert 200_000 < pending.stats.freed_nbytes < 202_000
        assert "room is short: 19" in caplog.text
        assert manifest_name(1) in caplog.text
        ckpt.wait()
        assert ckpt.steps() == [3, 4]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_copy_that_meets_a_full_disk_is_written_anew_once_room_was_made(code, caplog):
    store = SmallStore(700_000, says=False, code=code)
    saved(store, 200_000, 200_000, 200_000)
    with checkpointer(store, keep=gpuckpt.Keep(last=2), snapshot="copy") as ckpt:
        pending = ckpt.save(4, noise(250_000, 4))
        pending.result()
        ckpt.wait()
        assert ckpt.steps() == [3, 4]
    stats = pending.stats
    assert 200_000 < stats.freed_nbytes < 202_000
    assert (stats.chunks, stats.encoded_nbytes) == (4, 250_000), "those of one attempt"
    assert stats.written_nbytes == 250_000
    assert "step 4 is written anew, since room was made" in caplog.text
    assert damage(store, 4) == []
    assert unnamed(store) == set()


def test_a_state_that_was_held_is_not_read_again_but_the_next_save_has_the_room():
    store = SmallStore(700_000, says=False)
    saved(store, 200_000, 200_000, 200_000)
    with checkpointer(store, keep=gpuckpt.Keep(last=2), snapshot="hold") as ckpt:
        failure = failure_of(ckpt, 4, noise(250_000, 4))
        assert failure is not None
        assert failure.errno == errno.ENOSPC
        assert ckpt.steps() == [2, 3]
        assert unnamed(store) == set()
        assert failure_of(ckpt, 5, noise(250_000, 5)) is None
        assert ckpt.steps() == [3, 5]


def test_no_room_is_made_of_what_keep_keeps_nor_if_there_is_none():
    for keep, kept in ((None, [1, 2, 3]), (gpuckpt.Keep(last=3), [1, 2, 3])):
        for says in (True, False):
            store = SmallStore(700_000, says=says)
            saved(store, 200_000, 200_000, 200_000)
            before = store.files.copy()
            with checkpointer(store, keep=keep) as ckpt:
                assert failure_of(ckpt, 4, noise(250_000, 4)) is not None
                assert ckpt.steps() == kept
                assert store.files == before
            assert gpuckpt.load("", store=store)["w"].tobytes() == noise(200_000, 3)["w"].tobytes()


def test_a_full_disk_of_which_nothing_may_go_is_written_to_once(caplog):
    store = SmallStore(700_000, says=False)
    saved(store, 200_000, 200_000, 200_000)
    with checkpointer(store, keep=gpuckpt.Keep(last=3)) as ckpt, caplog.at_level(logging.INFO):
        assert failure_of(ckpt, 4, noise(250_000, 4)) is not None
    assert "anew" not in caplog.text


def test_the_checkpoint_that_a_run_was_set_back_to_is_not_deleted_for_room():
    store = SmallStore(10**9)
    saved(store, 200_000, 200_000, 200_000)
    with checkpointer(store, keep=gpuckpt.Keep(last=1)) as ckpt:
        state = {"w": np.zeros(200_000, np.uint8)}
        ckpt.restore(state, step=2)
        store.nbytes = sum(map(len, store.files.values())) + 1000
        assert failure_of(ckpt, 3, noise(300_000, 4)) is not None
        assert ckpt.steps() == [2, 3]
        assert damage(store, 2) == []


def test_files_of_a_failed_save_that_could_not_be_deleted_make_room():
    store = SmallStore(700_000)
    saved(store, 200_000)
    with checkpointer(store) as ckpt:
        left = "step-000000000002.0badcafe.r0.0.segment"
        store.files[left] = bytearray(400_000)
        pending = ckpt.save(2, noise(300_000, 2))
        pending.result()
        assert pending.stats.freed_nbytes == 400_000
        assert left not in store.files


def test_no_room_is_made_while_a_manifest_can_not_be_read(caplog):
    store = SmallStore(700_000)
    saved(store, 200_000, 200_000, 200_000)
    store.files[manifest_name(2)][200] ^= 1
    before = store.files.copy()
    with checkpointer(store, keep=gpuckpt.Keep(best=("loss", "min", 1))) as ckpt:
        assert failure_of(ckpt, 4, noise(250_000, 4)) is not None
    assert store.files == before
    assert "nothing or little could be deleted" in caplog.text


def test_a_rename_that_may_have_been_made_is_not_tried_again_and_nothing_is_deleted():
    store, state = FaultyStore(), new_state()
    saved(store, 1000, 1000, 1000)
    with checkpointer(store, keep=gpuckpt.Keep(last=1)) as ckpt:
        store.fault = Fault(0, errno.ENOSPC, DONE, only="rename")
        failure = failure_of(ckpt, 4, state)
        assert NOBODY_KNOWS in str(failure)
        assert steps(store) == [1, 2, 3, 4]
        assert len([one for one in store.operations if one.startswith("rename")]) == 4
        assert same(gpuckpt.load("", 4, store=store), state)


class Unsure(MemoryStore):
    """A store whose renames are made, and reported as failed, while it is `failing`."""

    failing, left = False, 10**9

    def rename(self, old: str, new: str) -> None:
        super().rename(old, new)
        if self.failing:
            raise refusal(errno.EIO, f"rename {old}")

    def free_nbytes(self) -> int | None:
        return self.left


def test_segments_of_the_last_checkpoint_stay_while_nobody_knows_whether_it_was_replaced():
    store, state = Unsure(), new_state()
    with checkpointer(store, codec="raw", full_every=1) as ckpt:
        ckpt.save(1, state).result()
        good = dict(store.files)
        advance(state, 2)
        store.failing = True
        assert NOBODY_KNOWS in str(failure_of(ckpt, 1, state))
        store.left = 10
        assert failure_of(ckpt, 2, advance(state, 3)) is not None  # it looks for room
    assert good.keys() <= store.files.keys()


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(60_000, 700_000), min_size=1, max_size=6),
    st.sampled_from(["raw", "auto", "delta"]),
    st.sampled_from([1, 8]),
    st.booleans(),
    st.sampled_from(["copy", "hold"]),
)
def test_a_disk_whose_room_comes_and_goes_has_whole_checkpoints_and_what_was_announced(
    rooms, codec, full_every, says, snapshot
):
    store, state, states, announced = SmallStore(0, says=says), new_state(), dict[int, State](), 0
    options = {"codec": codec, "full_every": full_every, "snapshot": snapshot}
    with checkpointer(store, keep=gpuckpt.Keep(last=1), **options) as ckpt:
        for step, nbytes in enumerate([*rooms, 10**6], 1):
            states[step] = advance(state, step)
            store.nbytes = nbytes
            if failure_of(ckpt, step, state) is None:
                announced = step
            check(store, states)
            assert unnamed(store) == set()
            assert steps(store) == ([announced] if announced else [])
        assert announced == len(rooms) + 1


class Gate(SmallStore):
    """A store that writes once it is let, and then has no room."""

    def __init__(self) -> None:
        super().__init__(10**9, says=False)
        self.opened = threading.Event()

    @property
    def left(self) -> int:
        assert self.opened.wait(30)
        return super().left


def test_a_disk_that_is_slow_before_it_fails_holds_up_nobody():
    store, state = Gate(), new_state()
    with checkpointer(store) as ckpt:
        pending = ckpt.save(1, state)
        was = advance(state, 1)  # the loop goes on
        assert not pending.committed.is_set()
        store.nbytes = 1000
        store.opened.set()
        with pytest.raises(StorageError, match=r"step 1 was not saved: .*No space left"):
            ckpt.wait()
        store.nbytes = 10**9
        ckpt.save(2, state).result()
    assert same(gpuckpt.load("", store=store), was)


# Each call of the system in turn


def local(root: Path) -> LocalStore:
    """A store whose files are written directly from 4 KiB on."""
    return LocalStore(root, blocks=Blocks(2 * ALIGNMENT, 3, ALIGNMENT))


def unnamed_in(root: Path) -> set[str]:
    return unnamed(LocalStore(root)) - {"lock"}


@pytest.mark.parametrize(
    ("how", "codes"), [*((how, CODES) for how in HOWS), (REFUSED, [errno.EINVAL])]
)
def test_whatever_the_system_refuses_the_last_good_checkpoint_stays_and_the_next_save_works(
    tmp_path, monkeypatch, how, codes
):
    struck, survived = set(), set()
    for at in itertools.count():
        root, state, states = tmp_path / str(at), new_state(), dict[int, State]()
        with monkeypatch.context() as patch:
            system = System(root, patch)
            store = local(root)
            with checkpointer(store, codec="delta", keep=gpuckpt.Keep(last=1)) as ckpt:
                states[1] = advance(state, 1)
                assert failure_of(ckpt, 1, state) is None
                states[2] = advance(state, 2)
                system.fault = fault = Fault(at, codes[at % len(codes)], how)
                failure = failure_of(ckpt, 2, state)
                system.fault = Fault(-1)
                struck.add(fault.struck)
                survived |= {fault.struck} if failure is None else set()
                if failure is not None:
                    told = str(failure)
                    assert told.startswith("step 2 was not saved: can't ")
                    assert str(root) in told
                    assert f"{os.strerror(fault.code)}; " in told, "what to do"
                    assert failure.errno == fault.code or NOBODY_KNOWS in told
                    assert 1 in steps(store)
                    assert NOBODY_KNOWS in told or unnamed_in(root) == set()
                check(store, states)
                states[3] = advance(state, 3)
                assert failure_of(ckpt, 3, state) is None
                assert unnamed_in(root) == set()
                check(store, states)
        if not fault.struck:
            break
    assert struck >= {"open", "pwritev", "preadv", "fsync", "close", "replace", "unlink", "scandir"}
    assert struck >= {"stat", "statvfs", "fcntl", "posix_fadvise"}
    assert ("pwritev" in survived) == (errno.EINVAL in codes), "then it is written in another way"


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_whatever_the_system_refuses_while_a_root_is_made_it_can_be_made_then(
    tmp_path, monkeypatch, code
):
    raised = set()
    for at in itertools.count():
        root = tmp_path / str(at) / "new" / "root"
        with monkeypatch.context() as patch:
            system = System(tmp_path / str(at), patch)
            (tmp_path / str(at)).mkdir()
            system.fault = fault = Fault(at, code)
            try:
                gpuckpt.Checkpointer(root).close()
            except StorageError as error:
                raised.add(fault.struck)
                assert f"{os.strerror(code)}; " in str(error)  # noqa: PT017 - or it is no matter
                assert str(tmp_path / str(at)) in str(error)  # noqa: PT017
            system.fault = Fault(-1)
            there = root.exists()
            system.calls.clear()
            gpuckpt.save(root, new_state(), 1)
            if fault.struck == "fsync" and not there:
                assert system.calls.count("mkdir") >= 1, "what isn't synced is made anew"
        if not fault.struck:
            break
    assert raised >= {"stat", "mkdir", "open", "fsync", "flock", "scandir"}
    assert not raised & {"pwrite", "ftruncate"}, "a full disk can be locked"


def test_what_a_failed_sync_may_have_lost_is_given_up_and_not_synced_again(tmp_path, monkeypatch):
    system = System(tmp_path, monkeypatch)
    file = local(tmp_path).create("f")
    file.append([bytes(50_000)])
    system.fault = Fault(0, errno.EIO, only="fsync")
    for use in (file.sync, file.sync, lambda: file.append([b"x"])):
        with pytest.raises(StorageError, match=f"can't sync {tmp_path}/f: .*disk reports an error"):
            use()
    assert system.calls.count("fsync") == 1
    file.close()


def test_an_error_of_a_read_names_file_and_offset(tmp_path, monkeypatch):
    system = System(tmp_path, monkeypatch)
    (tmp_path / "f").write_bytes(bytes(1000))
    system.fault = Fault(0, errno.EIO, only="preadv")
    with pytest.raises(StorageError, match=f"can't read {tmp_path}/f at byte 100: .*check it"):
        local(tmp_path).read_into("f", 100, memoryview(bytearray(10)))


def test_a_file_that_ends_too_early_is_damaged_from_there_on(tmp_path):
    (tmp_path / "f").write_bytes(bytes(1000))
    with pytest.raises(gpuckpt.CorruptError, match=f"{tmp_path}/f: ends at 1000, 1010 bytes"):
        local(tmp_path).read_into("f", 900, memoryview(bytearray(110)))


def test_reads_and_writes_that_stop_short_or_are_interrupted_go_on(tmp_path, monkeypatch):
    preadv, pwritev, data = os.preadv, os.pwritev, noise(1 << 20)["w"].tobytes()
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:4001]], at))
    monkeypatch.setattr(
        os,
        "pwritev",
        lambda fd, views, at: pwritev(fd, [b"".join(views)[: 3 * ALIGNMENT // 2]], at),
    )
    store, before = LocalStore(tmp_path), signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        file = store.create("f")
        for at in range(0, len(data), 100_000):
            file.append([data[at : at + 100_000]])
        file.sync()
        file.close()
        found = read_all(store, "f")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert found == data


def test_a_local_store_says_how_much_room_there_is_where_bytes_take_what_they_take(tmp_path):
    free = LocalStore(tmp_path / "not" / "there").free_nbytes()
    system = os.statvfs(tmp_path)
    if free is not None:
        assert abs(free - system.f_bfree * system.f_frsize) < system.f_blocks * system.f_frsize / 2
    assert LocalStore("/proc").free_nbytes() is None
    assert LocalStore("/dev/shm").free_nbytes() is not None


def test_where_bytes_may_take_less_than_they_are_nobody_knows_how_much_fits(monkeypatch):
    """Btrfs, ZFS, and whatever lies on a server."""
    monkeypatch.setattr("gpuckpt.stores.room._kind", lambda _: 0x9123683E)
    assert LocalStore("/dev/shm").free_nbytes() is None


def test_advice_that_the_system_refuses_fails_nothing(tmp_path, monkeypatch):
    system = System(tmp_path, monkeypatch)
    system.fault = Fault(0, errno.EINVAL, only="posix_fadvise")
    file = local(tmp_path).create("f")
    file.append([bytes(50_000)])
    assert system.fault.struck
    file.sync()
    file.close()


# Real file systems and limits


def run(program: str, *arguments: object, prefix: Sequence[str] = ()) -> str:
    """What a program prints that ends by itself, in a process of its own."""
    command = [*prefix, sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_root_that_can_not_be_a_directory_says_so(tmp_path, place):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StorageError, match=r"can't (lock|create) .*; "):
        gpuckpt.Checkpointer(tmp_path / place)
    with pytest.raises(StorageError, match=r"can't (lock|create) .*; "):
        gpuckpt.save(tmp_path / place, {"w": np.zeros(3)}, 1)
    assert (tmp_path / "file").read_bytes() == b"x"


def test_a_directory_without_permission_is_named(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can become nobody")
    tmp_path.chmod(0o755)
    for above in tmp_path.parents:
        if above != Path("/") and not above.stat().st_mode & 0o001:
            above.chmod(above.stat().st_mode | 0o001)
    program = """
        import os, sys
        import gpuckpt, numpy
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        for use in (lambda: gpuckpt.Checkpointer(sys.argv[1]),
                    lambda: gpuckpt.save(sys.argv[1], {"w": numpy.zeros(3)}, 1)):
            try:
                use()
            except gpuckpt.StorageError as error:
                print(error)
    """
    told = run(program, tmp_path).splitlines()
    assert len(told) == 2
    assert all(f"can't lock {tmp_path}/lock: Permission denied; check the" in one for one in told)


def test_a_limit_of_a_files_length_fails_a_save_and_the_next_one_works(tmp_path):
    program = """
        import os, resource, sys
        import gpuckpt, numpy
        state = {"w": numpy.random.default_rng(0).standard_normal(400_000)}
        with gpuckpt.Checkpointer(sys.argv[1], codec="raw") as ckpt:
            ckpt.save(1, {"w": numpy.zeros(5)}).result()
            before = sorted(os.listdir(sys.argv[1]))
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
            pending = ckpt.save(2, state)
            try:
                ckpt.wait()
            except gpuckpt.StorageError as error:
                print(error)
            print(before == sorted(os.listdir(sys.argv[1])))
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            ckpt.save(3, state).result()
        print((gpuckpt.load(sys.argv[1])["w"] == state["w"]).all())
    """
    told, *others = run(program, tmp_path).splitlines()
    assert told.startswith(f"step 2 was not saved: can't write {tmp_path}/step-000000000002.")
    assert told.endswith(
        "File too large; files may not get so long here: raise `ulimit -f`, or "
        "use another file system"
    )
    assert others == ["True", "True"]


def test_a_limit_of_open_files_fails_a_save_and_the_next_one_works(tmp_path):
    program = """
        import os, resource, sys
        import gpuckpt, numpy
        with gpuckpt.Checkpointer(sys.argv[1]) as ckpt:
            ckpt.save(1, {"w": numpy.zeros(5)}).result()
            ckpt.wait()
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            pending = ckpt.save(2, {"w": numpy.ones(5)})
            try:
                ckpt.wait()
            except gpuckpt.StorageError as error:
                print(error)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            ckpt.save(3, {"w": numpy.ones(5)}).result()
        print((gpuckpt.load(sys.argv[1])["w"] == 1).all(), len(os.listdir(sys.argv[1])))
    """
    told, rest = run(program, tmp_path).splitlines()
    assert told.startswith("step 2 was not saved: can't create ")
    assert told.endswith("too many open files: raise `ulimit -n`")
    assert rest == "True 5"


def mounted(kind: str, tmp_path: Path) -> list[str]:
    """What runs a command below which `tmp_path / "disk"` is a file system of 24 MiB of its own."""
    disk, image = tmp_path / "disk", tmp_path / "image"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=24m none {disk}"
    if kind == "ext4":
        with image.open("wb") as file:
            file.truncate(24 << 20)
        mount = f"mkfs.ext4 -q -m 0 {image} && mount -o loop {image} {disk}"
    # In a namespace of its own it is gone when the command ends, however it does.
    prefix = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c"]
    done = subprocess.run([*prefix, mount], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    return [*prefix, f'{mount} && exec "$@"', "sh"]


FULL_DISK = """
    import os, shutil, sys, warnings
    import gpuckpt, numpy
    from gpuckpt.stores.local import LocalStore

    root = sys.argv[1] + "/root"
    warnings.simplefilter("error")
    size = LocalStore(root).free_nbytes()

    def state(share, seed, name="w"):
        data = numpy.random.default_rng(seed).bytes(int(share * size))
        return {name: numpy.frombuffer(data, "u1")}

    def listed():
        return sorted((name, os.stat(root + "/" + name).st_size) for name in os.listdir(root))

    def fails(ckpt, step, what):
        before = listed()
        ckpt.save(step, what)
        try:
            ckpt.wait()
        except gpuckpt.StorageError as error:
            assert before == listed(), (before, listed())
            return str(error)
        raise AssertionError(step)

    def whole(step, what):
        assert (gpuckpt.load(root, step)["w"] == what["w"]).all()

    one, two, large = state(0.42, 1), state(0.42, 2), state(0.6, 3, "other")
    for codec in ("raw", "auto", "delta"):
        with gpuckpt.Checkpointer(root, codec=codec, snapshot="copy") as ckpt:
            ckpt.save(1, one).result()
            print(fails(ckpt, 2, large).replace(root, "ROOT"))
            whole(1, one)
            with open(sys.argv[1] + "/ballast", "wb") as ballast:
                ballast.write(bytes(int(0.25 * size)))
            fails(ckpt, 2, two)
            os.remove(ballast.name)
            ckpt.save(2, two).result()
            whole(2, two)
        keep = gpuckpt.Keep(last=1)
        with gpuckpt.Checkpointer(root, codec=codec, keep=keep, snapshot="copy") as ckpt:
            pending = ckpt.save(3, one)
            pending.result()
            assert pending.stats.freed_nbytes > 0.4 * size
            assert ckpt.steps() == [3], ckpt.steps()
        whole(3, one)
        shutil.rmtree(root)
"""


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_real_disk_that_gets_full_keeps_what_it_has_and_takes_the_next_save(tmp_path, kind):
    raw, *others = run(FULL_DISK, tmp_path / "disk", prefix=mounted(kind, tmp_path)).splitlines()
    assert raw.startswith("step 2 was not saved: ROOT: at least ")
    assert "left; nothing was written: free space" in raw
    assert len(others) == 2
    for told in others:
        assert "step 2 was not saved: can't write ROOT/step-000000000002." in told
        assert "No space left on device; the disk is full: free space, keep fewer" in told


def test_a_file_system_that_is_read_only_says_so_and_can_be_loaded_from(tmp_path):
    program = """
        import subprocess, sys
        import gpuckpt, numpy
        gpuckpt.save(sys.argv[1], {"w": numpy.arange(100.0)}, 1)
        subprocess.run(["mount", "-o", "remount,ro", sys.argv[1]], check=True)
        for use in (gpuckpt.Checkpointer, lambda root: gpuckpt.save(root, {"w": 1}, 2)):
            try:
                use(sys.argv[1])
            except gpuckpt.StorageError as error:
                print(error)
        print(gpuckpt.load(sys.argv[1])["w"].sum())
    """
    *told, rest = run(program, tmp_path / "disk", prefix=mounted("tmpfs", tmp_path)).splitlines()
    assert rest == "4950.0"
    assert len(told) == 2
    for one in told:
        assert one.startswith(f"can't lock {tmp_path}/disk/lock: Read-only file system; the file")
