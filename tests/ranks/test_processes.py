"""Real processes as ranks, by each way there is: the same for all."""

from __future__ import annotations

import pytest

from tests.launch import KINDS, launch

BOARDS = {
    "torch": "C10dBoard",
    "mpi": "MpiBoard",
    "jax": "CoordinationBoard",
    "store": "StoreBoard",
}
SIZES = [("torch", 4), ("torch", 8), ("mpi", 4), ("jax", 4), ("store", 4)]


@pytest.mark.parametrize(("kind", "size"), SIZES)
def test_ranks_keep_the_contract_of_a_group(kind, size, tmp_path, needs):
    needs(kind)
    found = launch(kind, "tests.ranks.workers:keeps_the_contract", size, tmp_path)
    for one in found:
        assert one.error is None, one.output
        value = one.value
        assert value["kind"] == BOARDS[kind]
        assert value["rounds"] == [[(bytes([r]) * r).hex() for r in range(size)]] * 5
        assert value["large"] == [[rank, 300_000, 1] for rank in range(size)]
        assert value["chosen"] == f"{sum(range(size))} bytes"
        assert value["odd"][0] == [1]
        assert "at 'parts of step 301', the others at 'parts of step 300'" in value["odd"][1]
        assert value["thread"] == value["rounds"][0]
        assert value["late"] == [[1], size]


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_rank_is_named_by_all_others_in_time(kind, tmp_path, needs):
    needs(kind)
    task = {"killed": 2, "timeout": 1.5}
    found = launch(kind, "tests.ranks.workers:loses_a_rank", 4, tmp_path, task)
    for rank in (0, 1, 3):
        assert found[rank].error is None, found[rank].output
        value = found[rank].value
        assert value["said"][0] == value["again"][0] == [2]
        assert "'commit of step 300'" in value["said"][1]
        assert value["seconds"] < 2 * (1.5 + 5.15)
    assert found[2].value is None


def test_a_killed_rank_0_is_named_by_all_others(tmp_path, needs):
    needs("torch")
    task = {"killed": 0, "timeout": 1.5}
    found = launch("torch", "tests.ranks.workers:loses_a_rank", 4, tmp_path, task)
    for rank in (1, 2, 3):
        assert found[rank].error is None, found[rank].output
        assert found[rank].value["said"][0] == [0]


def test_ranks_meet_beside_the_collectives_of_the_training(tmp_path, needs):
    needs("torch")
    found = launch("torch", "tests.ranks.workers:loops_in_its_framework", 4, tmp_path)
    for one in found:
        assert one.error is None, one.output
        assert one.value["sums"] == [6 + 4 * at for at in range(50)]


@pytest.mark.parametrize("kind", ["torch", "mpi"])
def test_a_part_of_the_ranks_is_a_group_of_its_own(kind, tmp_path, needs):
    needs(kind)
    worker, task = "tests.ranks.workers:meets_in_a_part", {"kind": kind}
    found = launch(kind, worker, 4, tmp_path, task)
    assert [one.error for one in found] == [None] * 4, found[1].output
    assert [one.value for one in found] == [None, ["1", "3"], None, ["1", "3"]]


def test_an_mpi_that_lets_one_thread_in_is_refused_with_what_to_do(tmp_path, needs, monkeypatch):
    needs("mpi")
    monkeypatch.setenv("MPI4PY_RC_THREAD_LEVEL", "funneled")
    (found,) = launch("mpi", "tests.ranks.workers:is_refused_by_mpi", 1, tmp_path)
    assert "mpi4py.rc.thread_level = 'multiple'" in found.value


def test_records_of_a_run_that_was_killed_are_swept_away_by_the_next(tmp_path, needs):
    task = {"killed": 2, "timeout": 0.5}
    launch("store", "tests.ranks.workers:loses_a_rank", 4, tmp_path, task)
    left = {one.name for one in (tmp_path / "root").iterdir()}
    assert left
    for result in tmp_path.glob("result-*"):
        result.unlink()
    found = launch("store", "tests.ranks.workers:keeps_the_contract", 4, tmp_path)
    assert [one.error for one in found] == [None] * 4
    now = {one.name for one in (tmp_path / "root").iterdir()}
    assert not left & now
    assert len(now) < 5
