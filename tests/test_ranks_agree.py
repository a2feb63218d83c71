"""Ranks agree: on what is due, on announcements of the end, on the step that all resume from."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.commit import steps
from gpuckpt.errors import RankError
from gpuckpt.groups import Group
from gpuckpt.groups.threads import MemoryBoard
from gpuckpt.journal import read_journal
from gpuckpt.layout import manifest_name
from gpuckpt.stores import Store
from gpuckpt.stores.memory import MemoryStore
from tests.ranks import run_ranks


@pytest.fixture(autouse=True)
def ranks_ask_often(monkeypatch):
    monkeypatch.setattr("gpuckpt.pace.ASK_SECONDS", 0.01)
    monkeypatch.setattr("gpuckpt.pace._SHARE", 1.0)


def saver(store: Store, group: Group, **options: Any) -> gpuckpt.Checkpointer:
    defaults: dict[str, Any] = {"memory": "4 MiB", "chunk_nbytes": 64 << 10, "group_timeout": 20}
    options = defaults | options
    return gpuckpt.Checkpointer("", store=store, group=group, **options)


def state_of(rank: int, value: int = 0) -> dict[str, Any]:
    rows = np.full((3, 5), value, np.float32)
    return {
        "w": np.full(9000, value, np.float32),
        "rows": gpuckpt.Sharded(rows, shape=(9, 5), offset=(3 * rank, 0)),
        "own": gpuckpt.PerRank({"value": value}),
    }


@pytest.mark.parametrize(
    "options",
    [
        {"every": gpuckpt.Every(seconds=0.03)},
        {"every": gpuckpt.Every(overhead=0.5)},
        {"every": gpuckpt.Every(steps=2), "when_busy": "skip"},
        {"every": gpuckpt.Every(seconds=0.02), "when_busy": "skip"},
    ],
    ids=str,
)
def test_all_save_the_same_steps_though_clocks_and_disks_differ(options):
    store, meets = MemoryStore(), threading.Barrier(3)

    def work(group: Group) -> list[int]:
        state, saved = state_of(group.rank), []
        with saver(store, group, keep=gpuckpt.Keep(last=1000), **options) as ckpt:
            for step in range(1, 41):
                meets.wait(20)  # as a training step does
                time.sleep(0.002 * (group.rank + 1))
                state["w"] += 1
                if ckpt.step(step, state) is not None:
                    saved.append(step)
        return saved

    found = run_ranks(3, work)
    assert found[0] == found[1] == found[2] == steps(store)
    assert found[0]


def test_groups_for_one_thread_alone_ask_when_no_save_is_in_flight(monkeypatch):
    monkeypatch.setattr(MemoryBoard, "for_threads", False)
    options = {"every": gpuckpt.Every(seconds=0.03)}
    test_all_save_the_same_steps_though_clocks_and_disks_differ(options)


@pytest.mark.parametrize("announced", [{1}, {0}, {0, 1, 2}])
@pytest.mark.parametrize("method", ["step", "save"])
def test_an_end_that_is_announced_to_some_ends_all_at_one_step(announced, method):
    store, meets = MemoryStore(), threading.Barrier(3)

    def work(group: Group) -> tuple[int, int | None]:
        state, now = state_of(group.rank), [0]

        def is_told() -> bool:
            return group.rank in announced and now[0] >= 5

        options = {"every": gpuckpt.Every(steps=1000)} if method == "step" else {}
        with saver(store, group, preempt=is_told, grace=60, **options) as ckpt:
            for step in range(1, 500):
                meets.wait(20)
                now[0] = step
                getattr(ckpt, method)(step, state)
                if ckpt.should_stop:
                    assert ckpt.preemption is not None
                    assert ckpt.preemption.saved
                    return step, ckpt.preemption.newest
        raise AssertionError("it was never told")

    found = run_ranks(3, work)
    assert len(set(found)) == 1
    assert steps(store)[-1] == found[0][0] >= 5


def test_ranks_with_different_schedules_are_named_as_they_begin():
    def work(group: Group) -> None:
        every = gpuckpt.Every(steps=2 + (group.rank == 2))
        with (
            pytest.raises(RankError, match="every="),
            saver(store, group, every=every),
        ):
            raise AssertionError("it was opened")

    store = MemoryStore()
    run_ranks(3, work)


def test_one_that_alone_listens_makes_all_ask():
    """`preempt` on one rank only."""
    store = MemoryStore()

    def work(group: Group) -> bool:
        preempt = (lambda: True) if group.rank == 1 else None
        with saver(store, group, preempt=preempt, every=gpuckpt.Every(steps=100)) as ckpt:
            ckpt.step(1, state_of(group.rank))
            return ckpt.should_stop

    assert run_ranks(3, work) == [True] * 3


def saved_on_machines(count: int, last: int) -> list[MemoryStore]:
    stores = [MemoryStore() for _ in range(count)]

    def work(group: Group) -> None:
        with saver(stores[group.rank], group, keep=gpuckpt.Keep(last=9)) as ckpt:
            for step in range(1, last + 1):
                ckpt.save(step, state_of(group.rank, step))

    run_ranks(count, work)
    return stores


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sets(st.integers(1, 4)), min_size=3, max_size=3))
def test_all_resume_from_the_newest_step_that_all_have(lost):
    """Each machine's disk has lost some."""
    stores = saved_on_machines(3, 4)
    for store, gone in zip(stores, lost, strict=True):
        for step in gone:
            store.remove(manifest_name(step))

    def work(group: Group) -> int:
        state = state_of(group.rank)
        with saver(stores[group.rank], group) as ckpt:
            done = ckpt.resume(state)
        assert (state["rows"].array == done).all()
        assert (state["w"] == done).all()
        return done

    common = {1, 2, 3, 4} - set.union(*lost)
    assert run_ranks(3, work) == [max(common, default=0)] * 3


def test_ranks_whose_machines_have_different_checkpoints_of_a_number_take_another():
    stores, others = saved_on_machines(3, 2), saved_on_machines(3, 2)
    for name in [one for one in stores[1].files if "000002" in one]:
        stores[1].remove(name)
    for name, data in others[1].files.items():
        if "000002" in name:
            stores[1].files[name] = data

    def fails(group: Group) -> None:
        with saver(stores[group.rank], group) as ckpt, pytest.raises(RankError, match="different"):
            ckpt.restore(state_of(group.rank), 2)

    run_ranks(3, fails)
    with pytest.warns(RuntimeWarning):
        assert resumed(stores) == [1] * 3


def resumed(stores: list[MemoryStore], **options: Any) -> list[int]:
    def work(group: Group) -> int:
        with saver(stores[group.rank], group) as ckpt:
            return ckpt.resume(state_of(group.rank), **options)

    return run_ranks(len(stores), work)


def test_a_shard_that_is_damaged_on_one_rank_makes_all_fall_back():
    stores = saved_on_machines(3, 3)
    (segment,) = [name for name in stores[2].files if "000003" in name and "segment" in name]
    stores[2].files[segment][100] ^= 1

    def fails(group: Group) -> None:
        with (
            saver(stores[group.rank], group) as ckpt,
            pytest.raises(gpuckpt.CheckpointError, match=r"checksum|rank 2"),
        ):
            ckpt.resume(state_of(group.rank))

    run_ranks(3, fails)
    with pytest.warns(RuntimeWarning, match="step 2 was taken"):
        assert resumed(stores, fallback=True) == [2] * 3


def test_each_rank_has_a_log_of_its_own_that_says_how_long_it_waited(tmp_path):
    def work(group: Group) -> None:
        options: dict[str, Any] = {"memory": "4 MiB", "chunk_nbytes": 64 << 10}
        with gpuckpt.Checkpointer(tmp_path, group=group, log=True, **options) as ckpt:
            if group.rank == 2:
                time.sleep(0.3)
            ckpt.save(1, state_of(group.rank, 1))
            ckpt.save(2, state_of(group.rank, 2))

    run_ranks(3, work)
    logs = sorted(path.name for path in Path(tmp_path).glob("saves*"))
    assert logs == ["saves.jsonl", "saves.r1.jsonl", "saves.r2.jsonl"]
    for name in logs:
        records = read_journal(tmp_path / name)
        assert [one.stats.step for one in records] == [1, 2]
        assert all(one.stats.ranks_seconds > 0 for one in records)
    assert read_journal(tmp_path)[0].stats.share_seconds > 0.2
    (tmp_path / "saves.jsonl").unlink()
    assert [one.stats.step for one in read_journal(tmp_path)] == [1, 2]
