"""torch.distributed.checkpoint with gpuckpt as its storage: real ranks, real models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gpuckpt
from tests.launch import launch

torch = pytest.importorskip("torch", reason="torch isn't installed (make test-ranks)")

WORKERS = "tests.ranks.dcp_workers"


def ranks(worker: str, size: int, directory: Path, **arguments: Any) -> list[Any]:
    found = launch("torch", f"{WORKERS}:{worker}", size, directory, arguments, timeout=150)
    for one in found:
        assert one.error is None, one.output
    return [one.value for one in found]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The places of checkpoints of one model, by the way it was sharded, and what they hold."""
    made = {}

    def save(way, size):
        if (way, size) not in made:
            directory = tmp_path_factory.mktemp(f"{way}-{size}")
            place = directory / "step-300"
            values = ranks("saves", size, directory, way=way, place=str(place))
            assert all(value == values[0] for value in values)
            made[way, size] = place, values[0]
        return made[way, size]

    return save


MESHES = [
    ((("fsdp", 4)), ("2d", 4)),
    ((("2d", 4)), ("fsdp", 2)),
    ((("2d", 4)), ("tp", 4)),
    ((("hsdp", 4)), ("fsdp", 4)),
    ((("fsdp", 4)), ("alone", 1)),
    ((("fsdp", 4)), ("hsdp", 8)),
]


@pytest.mark.parametrize(("before", "after"), MESHES)
def test_a_model_saved_on_one_mesh_is_restored_on_another_bit_for_bit(
    saved, before, after, tmp_path
):
    place, wanted = saved(*before)
    assert len(wanted) > 30
    for was, now in ranks("loads", after[1], tmp_path, way=after[0], place=str(place)):
        assert was != wanted
        assert now == wanted


def test_a_checkpoint_of_dcps_ranks_is_one_of_gpuckpt(saved):
    place, wanted = saved("2d", 4)
    from tests.ranks.dcp_workers import digests

    assert digests(gpuckpt.load(place)) == wanted
    command = [sys.executable, "-m", "gpuckpt", "verify", str(place)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("by", "sizes", "ways"),
    [
        ("dcp", (4, 4), ("rows", "columns")),
        ("dcp", (8, 4), ("columns", "rows")),
        ("checkpointer", (4, 2), ("rows", "columns")),
    ],
)
def test_tensors_of_every_placement_are_restored_on_others(by, sizes, ways, tmp_path):
    place = str(tmp_path / "checkpoint")
    first, second = (tmp_path / "first", tmp_path / "second")
    wanted = ranks("saves_placed", sizes[0], first, way=ways[0], place=place, by=by)
    found = ranks("loads_placed", sizes[1], second, way=ways[1], place=place)
    assert {str(one) for one in (*wanted, *found)} == {str(wanted[0])}


@pytest.mark.parametrize("how", ["fail", "die"])
def test_if_a_rank_fails_or_dies_nothing_is_committed(how, tmp_path):
    place = tmp_path / "checkpoint"
    options = {"way": "rows", "place": str(place), "by": "dcp"}
    wanted = ranks("saves_placed", 4, tmp_path / "1", **options)
    task = {"how": how, "place": str(place)}
    found = launch("torch", f"{WORKERS}:loses", 4, tmp_path / "2", task, timeout=100)
    for rank, one in enumerate(found):
        if how == "fail":
            assert "(RANK 1)" in one.value, one.output
            assert "the disk is full" in one.value
        else:
            assert one.value != "saved", (rank, one.output)
    assert found[1].code == (9 if how == "die" else 0)
    left = len(list(place.glob("*.segment")))
    assert left > 4
    assert ranks("loads_placed", 4, tmp_path / "3", **options) == wanted
    assert ranks("saves_placed", 4, tmp_path / "4", **options) == wanted
    assert len(list(place.glob("*.part.json"))) == 4
    assert len(list(place.glob("*.segment"))) <= 4


def test_ranks_without_collectives_have_checkpoints_of_their_own(tmp_path):
    for saved, found in ranks("saves_alone", 2, tmp_path, place=str(tmp_path / "a")):
        assert saved == found


def test_asynchronous_saves_in_a_thread_and_in_a_process(tmp_path):
    values = ranks("saves_asynchronously", 2, tmp_path, place=str(tmp_path / "a"))
    for value in values:
        assert all(one == value[0] for one in value)
