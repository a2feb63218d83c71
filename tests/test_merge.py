"""Ranks' own directories, gathered from machines that share none, become one checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import gpuckpt
from gpuckpt.groups import Group
from gpuckpt.layout import part_step, segment_step
from gpuckpt.merging import merge
from gpuckpt.resources import Resources
from gpuckpt.stores.local import LocalStore
from gpuckpt.verify import verify_step
from tests.ranks import run_ranks

ROWS, SIZE = 999, 3
KEY = b"a key of thirty-two bytes or more."


def table(step: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(step).standard_normal((ROWS, 32), np.float32)


def save_apart(root: Path, steps: int = 1, key: bytes | None = None) -> list[Path]:
    """Each rank saves to a directory of its own; these."""
    frozen = np.arange(50_000.0)

    def work(group: Group) -> None:
        first, last = (ROWS * at // SIZE for at in (group.rank, group.rank + 1))
        place = root / f"machine{group.rank}"
        with gpuckpt.Checkpointer(
            place, group=group, memory="64 MiB", group_timeout=20, key=key
        ) as ckpt:
            for step in range(1, steps + 1):
                rows = gpuckpt.Sharded(table(step)[first:last].copy(), (ROWS, 32), (first, 0))
                state = {"w": rows, "frozen": frozen, "rank": gpuckpt.PerRank(Own(group.rank))}
                ckpt.save(step, state).result(20)

    run_ranks(SIZE, work)
    return [root / f"machine{rank}" for rank in range(SIZE)]


class Own:
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def state_dict(self) -> dict[str, int]:
        return {"rank": self.rank}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.rank = state["rank"]


def files_of(root: Path, rank: int, step: int) -> list[Path]:
    return [
        path
        for path in root.iterdir()
        if f".r{rank}." in path.name and step in (part_step(path.name), segment_step(path.name))
    ]


def check(root: Path, step: int, key: bytes | None = None) -> None:
    loaded = gpuckpt.load(root, key=key)
    assert loaded["w"].tobytes() == table(step).tobytes()
    assert loaded["frozen"].tobytes() == np.arange(50_000.0).tobytes()
    assert loaded["rank"] == {"rank": 0}
    assert verify_step(LocalStore(root), step, Resources("64 MiB")) == []


def test_directories_of_ranks_become_one_checkpoint(tmp_path):
    roots = save_apart(tmp_path)
    with pytest.raises(gpuckpt.CheckpointError):
        gpuckpt.load(roots[0])
    done = merge(roots, tmp_path / "all")
    assert (done.step, done.ranks) == (1, SIZE)
    assert {name for name in done.files if part_step(name) is not None} == {
        path.name for root in roots for path in root.iterdir() if part_step(path.name) is not None
    }
    check(tmp_path / "all", 1)
    again = merge(roots, tmp_path / "all")
    assert again.files == ()


def test_the_newest_step_that_is_whole_is_taken_and_what_older_steps_hold_of_it(tmp_path):
    roots = save_apart(tmp_path, steps=3)
    lost = files_of(roots[2], 2, 3)
    assert lost
    for path in lost:
        path.unlink()
    assert merge(roots, tmp_path / "all").step == 2
    check(tmp_path / "all", 2)
    with pytest.raises(gpuckpt.NotFoundError) as error:
        merge(roots, tmp_path / "other", 3)
    assert all(path.name in str(error.value) for path in lost)
    assert "step 3" in str(error.value)
    assert not (tmp_path / "other").exists() or not list((tmp_path / "other").glob("step-*"))


def test_without_a_ranks_directory_its_part_is_named_and_nothing_is_made(tmp_path):
    roots = save_apart(tmp_path)
    with pytest.raises(gpuckpt.NotFoundError, match=r"r1\.part\.json.* in none of them"):
        merge([roots[0], roots[2]], tmp_path / "all")
    assert not list((tmp_path / "all").glob("step-*"))


def test_damage_is_found_before_the_checkpoint_is_visible(tmp_path):
    roots = save_apart(tmp_path)
    (segment,) = [path for path in files_of(roots[1], 1, 1) if path.suffix == ".segment"]
    data = bytearray(segment.read_bytes())
    data[100] ^= 1
    segment.write_bytes(data)
    with pytest.raises(gpuckpt.CorruptError) as error:
        merge(roots, tmp_path / "all")
    assert str(segment) in error.value.where
    assert not list((tmp_path / "all").glob("step-*"))


def test_a_root_that_is_merged_is_not_written_to(tmp_path):
    roots = save_apart(tmp_path)
    with pytest.raises(gpuckpt.InvalidError, match="is one of the roots"):
        merge(roots, roots[1])


def test_another_checkpoint_of_the_same_step_stays(tmp_path):
    roots = save_apart(tmp_path / "one")
    gpuckpt.save(tmp_path / "all", {"w": np.zeros(3)}, 1)
    with pytest.raises(gpuckpt.InvalidError, match="another checkpoint of step 1"):
        merge(roots, tmp_path / "all")
    assert gpuckpt.load(tmp_path / "all")["w"].tolist() == [0, 0, 0]


def test_a_seal_is_valid_in_the_new_root(tmp_path):
    roots = save_apart(tmp_path, key=KEY)
    merge(roots, tmp_path / "all", key=KEY)
    check(tmp_path / "all", 1, key=KEY)
    with pytest.raises(gpuckpt.AuthenticationError):
        gpuckpt.load(tmp_path / "all", key=b"another key of thirty-two bytes ...")


def test_what_a_merge_that_died_left_is_swept_and_written_anew(tmp_path):
    roots = save_apart(tmp_path)
    left = files_of(roots[0], 0, 1)[0]
    (tmp_path / "all").mkdir()
    shutil.copy(left, tmp_path / "all")
    with (tmp_path / "all" / left.name).open("r+b") as file:
        file.truncate(10)
    merge(roots, tmp_path / "all")
    check(tmp_path / "all", 1)


def test_the_command_merges(tmp_path):
    roots = save_apart(tmp_path)
    command = [sys.executable, "-m", "gpuckpt", "merge", *map(str, roots)]
    done = subprocess.run(
        [*command, "--to", str(tmp_path / "all"), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    facts = json.loads(done.stdout)
    assert (facts["step"], facts["ranks"]) == (1, SIZE)
    check(tmp_path / "all", 1)
    failed = subprocess.run(
        [*command[:-1], "--to", str(tmp_path / "b")], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 2
    assert "r2.part.json" in failed.stderr
