"""Everything that the two systems which this one grew from did, and what they warned of.

Apache SINGA ("Checkpoint and Resume") and Paddle Fluid ("Checkpoint User
Guide"); docs/ANCESTORS.md has the same rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuckpt
from gpuckpt.commit import open_step
from gpuckpt.errors import LockedError
from gpuckpt.groups import Group
from gpuckpt.layout import segment_step
from gpuckpt.stores import Store
from gpuckpt.stores.memory import MemoryStore
from tests.ranks import run_ranks

ROWS, WIDTH = 4096, 64


def rows_of(group: Group, table: Any, size: int | None = None) -> gpuckpt.Sharded:
    """A rank's rows of a table, as a parameter server has them."""
    size = size or group.size
    first, last = (len(table) * at // size for at in (group.rank, group.rank + 1))
    return gpuckpt.Sharded(table[first:last].copy(), shape=table.shape, offset=(first, 0))


def opened(root: Path | None, group: Group, **options: Any) -> gpuckpt.Checkpointer:
    options.setdefault("group_timeout", 20)
    return gpuckpt.Checkpointer(root or "", group=group, memory="64 MiB", **options)


def test_singa_saves_after_some_steps_and_then_every_so_many(tmp_path):
    state = {"w": np.zeros(4)}
    every = gpuckpt.Every(steps=300, after=100)  # checkpoint_frequency, checkpoint_after
    with gpuckpt.Checkpointer(tmp_path, every=every, full_every=1) as ckpt:
        ckpt.resume(state)
        for step in range(1, 701):
            state["w"] += 1
            ckpt.step(step, state)
        ckpt.wait()
        assert ckpt.steps() == [400, 700]


def test_singa_resumes_from_the_newest_step_without_a_change_to_the_job(tmp_path):
    for begin in (0, 400):
        state = {"w": np.zeros(4)}
        with gpuckpt.Checkpointer(tmp_path, every=gpuckpt.Every(steps=200)) as ckpt:
            done = ckpt.resume(state)
            assert done == begin
            np.testing.assert_array_equal(state["w"], done)
            for step in range(done + 1, done + 401):
                state["w"] += 1
                ckpt.step(step, state)


def test_singa_initialises_a_similar_model_by_name_from_the_files_of_several_workers(tmp_path):
    table = np.arange(ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)

    def work(group: Group) -> None:
        with opened(tmp_path, group, codec="raw") as ckpt:
            ckpt.save(400, {"embed": rows_of(group, table), "old": np.ones(3)})

    run_ranks(2, work)
    files = sorted(path for path in tmp_path.iterdir() if segment_step(path.name) == 400)
    assert len(files) == 2  # a partition of each worker
    model = {"embed": np.zeros_like(table), "head": np.full(5, 7.0)}
    report = gpuckpt.warm_start(model, files)
    np.testing.assert_array_equal(model["embed"], table)
    np.testing.assert_array_equal(model["head"], 7.0)  # what has no match keeps its value
    assert set(report.matched) == {"embed"}
    assert set(report.unmatched) == {"head"}


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (1, 4), (5, 1)])
def test_singas_caution_partitions_of_two_workers_go_to_three(before, after):
    store = MemoryStore()
    table = np.random.default_rng(0).standard_normal((ROWS, WIDTH), np.float32)

    def save(group: Group) -> None:
        with opened(None, group, store=store) as ckpt:
            ckpt.save(1, {"w": rows_of(group, table)})

    def resume(group: Group) -> None:
        state = {"w": rows_of(group, np.zeros_like(table))}
        with opened(None, group, store=store) as ckpt:
            assert ckpt.resume(state) == 1
        np.testing.assert_array_equal(state["w"].array, rows_of(group, table).array)

    run_ranks(before, save)
    run_ranks(after, resume)


def test_fluids_first_trainer_alone_need_not_save_the_model_and_each_saves_its_arguments():
    store = MemoryStore()

    def work(group: Group) -> None:
        state = {
            "model": {"w": np.full((512, 256), 1.5, np.float32)},
            "trainer": gpuckpt.PerRank({"epoch_id": 3, "step_id": 100 + group.rank}),
        }
        with opened(None, group, store=store, codec="raw") as ckpt:
            ckpt.save(7, state)
        fresh: dict[str, Any] = {
            "model": {"w": np.zeros((512, 256), np.float32)},
            "trainer": gpuckpt.PerRank({"epoch_id": 0, "step_id": 0}),
        }
        with opened(None, group, store=store) as ckpt:
            assert ckpt.resume(fresh) == 7
        assert fresh["trainer"].value == {"epoch_id": 3, "step_id": 100 + group.rank}
        np.testing.assert_array_equal(fresh["model"]["w"], 1.5)

    run_ranks(3, work)
    model = 512 * 256 * 4
    assert model < open_step(store).raw_nbytes < 1.2 * model  # once, not three times


def test_fluids_parameter_servers_save_the_rows_of_a_lookup_table_that_were_touched():
    store = MemoryStore()
    table = np.random.default_rng(0).standard_normal((1 << 15, WIDTH), np.float32)

    def work(group: Group) -> int:
        rows = rows_of(group, table)
        with opened(None, group, store=store, codec="raw", chunk_nbytes=1 << 18) as ckpt:
            ckpt.save(1, {"table": rows}).result(20)
            if group.rank == 2:
                rows.array[5] += 1
            ckpt.save(2, {"table": rows}).result(20)
        return _written(store, 2, group.rank)

    written = run_ranks(4, work)
    whole = table.nbytes // 4
    assert [nbytes > 0 for nbytes in written] == [False, False, True, False]
    assert written[2] < whole / 4  # one chunk of its shard
    again = gpuckpt.load("", store=store)["table"]
    expected = table.copy()
    expected[len(table) // 2 + 5] += 1
    np.testing.assert_array_equal(again, expected)


def test_fluid_keeps_as_many_copies_as_it_is_told_and_saves_by_epochs_and_steps(tmp_path):
    state = {"w": np.zeros(4)}
    keep = gpuckpt.Keep(last=2)  # max_num_checkpoints
    every = gpuckpt.Every(epochs=2, steps=10)  # epoch_interval, step_interval
    saved = []
    with gpuckpt.Checkpointer(tmp_path, every=every, keep=keep, full_every=1) as ckpt:
        for step in range(1, 45):
            state["w"] += 1
            if ckpt.step(step, state, epoch=1 + step // 15) is not None:
                saved.append(step)
        ckpt.wait()
        assert saved == [10, 15, 20, 30, 40]
        assert ckpt.steps() == [30, 40]


def test_fluid_asks_that_a_directory_be_one_jobs_and_here_it_is_locked(tmp_path):
    with gpuckpt.Checkpointer(tmp_path), pytest.raises(LockedError):
        gpuckpt.Checkpointer(tmp_path)


def test_fluid_asks_a_file_system_to_merge_the_trainers_directories(tmp_path):
    from gpuckpt.merging import merge

    table = np.random.default_rng(0).standard_normal((ROWS, WIDTH), np.float32)

    def work(group: Group) -> None:
        with opened(tmp_path / f"machine{group.rank}", group) as ckpt:
            ckpt.save(1, {"w": rows_of(group, table), "b": np.arange(9)})

    run_ranks(3, work)
    merge([tmp_path / f"machine{rank}" for rank in range(3)], tmp_path / "all")
    state = gpuckpt.load(tmp_path / "all")
    np.testing.assert_array_equal(state["w"], table)
    np.testing.assert_array_equal(state["b"], np.arange(9))


def _written(store: Store, step: int, rank: int) -> int:
    """Bytes of the segments that a rank has written for a step."""
    named = [name for name in store.names() if segment_step(name) == step and f".r{rank}." in name]
    return sum(store.size(name) for name in named)
