"""Salvaging: what is intact of a damaged step becomes a checkpoint elsewhere; the rest is named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import gpuckpt
from gpuckpt import layout
from gpuckpt.commit import open_step
from gpuckpt.groups.meeting import Meeting
from gpuckpt.rebuilding import step_of
from gpuckpt.repair import Repaired, repair
from gpuckpt.resources import Resources
from gpuckpt.stores.local import LocalStore
from gpuckpt.tensors import TensorEntry
from gpuckpt.verify import verify_step
from tests.ranks import run_ranks
from tests.saving import save
from tests.test_cli import run


def state_at(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    return {
        "model": {"w": rng.standard_normal((30, 40)), "b": rng.standard_normal(70).astype("f4")},
        "list": [rng.integers(0, 9, 50), rng.integers(0, 9, 60)],
        "frozen": np.arange(1000),
        "lr": 0.5 / step,
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 1, 2 and 3, each in files of its own."""
    for step in (1, 2, 3):
        gpuckpt.save(tmp_path / "root", state_at(step), step, metrics={"loss": step}, codec="raw")
    return tmp_path / "root"


def rot(root: Path, step: int, name: str) -> str:
    """Flip a bit of a tensor's first chunk; the name of its file."""
    extent = entry_of(root, step, name).chunks[0].extent
    path = root / extent.segment
    data = bytearray(path.read_bytes())
    data[extent.offset + extent.length // 2] ^= 8
    path.write_bytes(data)
    return path.name


def entry_of(root: Path, step: int, name: str) -> TensorEntry:
    tensors = open_step(LocalStore(root), step).tensors
    return next(entry for entry in tensors if entry.spec.name == name)


def break_manifest(root: Path, step: int) -> None:
    path = root / layout.manifest_name(step)
    path.write_bytes(path.read_bytes().replace(b'"step"', b'"stex"'))


def repaired(root: Path, step: int | None = None, *, fill: bool = False) -> Repaired:
    store, target = LocalStore(root), LocalStore(root.parent / "to")
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in root.iterdir()}
    done = repair(store, step_of(store, step), target, fill=fill)
    after = {path: hashlib.sha256(path.read_bytes()).digest() for path in root.iterdir()}
    assert before == after, "the source was changed"
    assert not verify_step(target, done.written.step, Resources("64 MiB"))
    return done


def lost_names(done: Repaired) -> list[str]:
    return [loss.entry.spec.name for loss in done.lost]


def loaded(root: Path) -> Any:
    return gpuckpt.load(root.parent / "to")


def test_a_whole_step_is_copied_and_nothing_is_lost(root):
    done = repaired(root, 2)
    assert done.is_whole
    found = loaded(root)
    assert np.array_equal(found["model"]["w"], state_at(2)["model"]["w"])
    assert found["lr"] == 0.25
    written = open_step(LocalStore(root.parent / "to"))
    assert (written.step, written.metrics) == (2, {"loss": 2})
    assert written.created == open_step(LocalStore(root), 2).created


def test_a_damaged_tensor_is_absent_and_all_others_are_there_bit_for_bit(root):
    file = rot(root, 3, "model.w")
    done = repaired(root)
    assert lost_names(done) == ["model.w"]
    (loss,) = done.lost
    assert loss.wounds[0].extent.segment == file
    assert "checksum" in loss.wounds[0].reason
    assert loss.older is not None
    assert loss.older[0] == 2
    found = loaded(root)
    wanted = state_at(3)
    assert set(found["model"]) == {"b"}
    assert np.array_equal(found["model"]["b"], wanted["model"]["b"])
    assert np.array_equal(found["list"][1], wanted["list"][1])
    assert found["lr"] == wanted["lr"]


def test_what_is_lost_keeps_its_value_when_the_rest_is_restored(root):
    rot(root, 3, "model.w")
    repaired(root)
    state = state_at(9)
    mine = state["model"]["w"].copy()
    with gpuckpt.Checkpointer(root.parent / "to") as ckpt:
        with pytest.raises(gpuckpt.MismatchError) as caught:
            ckpt.resume(state)
        assert caught.value.missing == ("model.w",)
        assert ckpt.restore(state, strict=False) == 3
        assert np.array_equal(state["model"]["w"], mine)
        assert np.array_equal(state["model"]["b"], state_at(3)["model"]["b"])
        save(ckpt, 4, state)
    assert not verify_step(LocalStore(root.parent / "to"), 4, Resources("64 MiB"))


class Layer:
    """An object that wants all of its state, as a module of PyTorch does."""

    def __init__(self, fill: float) -> None:
        self.w, self.b = np.full(50, fill), np.full(60, fill)

    def state_dict(self) -> dict[str, Any]:
        return {"w": self.w, "b": self.b}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.w, self.b = state["w"], state["b"]


def test_an_object_that_refuses_a_part_of_its_state_gets_it_by_names(tmp_path):
    gpuckpt.save(tmp_path / "root", {"layer": Layer(1.0)}, 1, codec="raw")
    rot(tmp_path / "root", 1, "layer.w")
    repaired(tmp_path / "root")
    state = {"layer": Layer(5.0)}
    with gpuckpt.Checkpointer(tmp_path / "to") as ckpt:
        with pytest.raises(gpuckpt.MismatchError, match="load_state_dict refused"):
            ckpt.restore(state, strict=False)
        state = {"layer": Layer(5.0)}
        assert ckpt.restore(state, strict=False, names="*") == 1
    assert (state["layer"].w == 5).all()
    assert (state["layer"].b == 1).all()


def test_in_a_list_none_stands_in_the_place_of_what_is_lost(root):
    rot(root, 3, "list.0")
    repaired(root)
    found = loaded(root)
    assert found["list"][0] is None
    assert np.array_equal(found["list"][1], state_at(3)["list"][1])


def test_the_same_bytes_in_another_step_s_files_are_found_again(root):
    rot(root, 3, "frozen")
    done = repaired(root)
    assert done.is_whole
    assert done.found.recovered == {"frozen": 2}
    assert np.array_equal(loaded(root)["frozen"], np.arange(1000))


def test_newer_steps_help_too(root):
    rot(root, 1, "frozen")
    assert repaired(root, 1).found.recovered == {"frozen": 2}


def test_with_fill_a_lost_tensor_gets_the_newest_intact_older_value_and_it_is_said(root):
    rot(root, 3, "model.w")
    rot(root, 2, "model.w")
    done = repaired(root, fill=True)
    assert not done.is_whole
    assert done.filled == {"model.w": 1}
    assert done.lost == []
    found = loaded(root)
    assert np.array_equal(found["model"]["w"], state_at(1)["model"]["w"])
    assert np.array_equal(found["model"]["b"], state_at(3)["model"]["b"])
    assert entry_of(root.parent / "to", 3, "model.w").version == 1


def test_a_damaged_manifest_costs_structure_and_values_and_no_tensor(root):
    break_manifest(root, 3)
    done = repaired(root)
    assert not done.is_whole
    assert "checksum" in done.found.unread
    assert lost_names(done) == []
    found, wanted = loaded(root), state_at(3)
    assert set(found) == {"model.w", "model.b", "list.0", "list.1", "frozen"}
    assert np.array_equal(found["model.w"], wanted["model"]["w"])
    state = state_at(9)
    with gpuckpt.Checkpointer(root.parent / "to") as ckpt:
        ckpt.restore(state, strict=False)
    assert np.array_equal(state["list"][1], wanted["list"][1])


def test_with_fill_a_damaged_manifest_s_structure_and_values_are_the_older_step_s(root):
    break_manifest(root, 3)
    done = repaired(root, fill=True)
    assert done.found.template is not None
    found, wanted = loaded(root), state_at(3)
    assert np.array_equal(found["model"]["w"], wanted["model"]["w"])
    assert np.array_equal(found["list"][0], wanted["list"][0])
    assert found["lr"] == state_at(2)["lr"]


def test_a_step_whose_manifest_is_gone_is_salvaged_by_its_number(root):
    (root / layout.manifest_name(3)).unlink()
    assert repaired(root).written.step == 2
    done = repaired(root, 3)
    assert "may never have been committed" in done.found.unread
    assert np.array_equal(gpuckpt.load(root.parent / "to", 3)["frozen"], np.arange(1000))


def test_of_several_saves_of_a_step_the_one_that_its_manifest_names_is_salvaged(root, tmp_path):
    """A save that was cut short may have left larger files."""
    other = {**state_at(8), "more": np.zeros(9000)}
    gpuckpt.save(tmp_path / "other", other, 3, codec="raw")
    (left,) = (tmp_path / "other").glob("*.segment")
    (root / left.name).write_bytes(left.read_bytes())
    break_manifest(root, 3)
    repaired(root)
    assert np.array_equal(loaded(root)["model.w"], state_at(3)["model"]["w"])


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Three steps by deltas, with a frozen tensor, and a copy that is derived from its master."""
    rng = np.random.default_rng(0)
    master = rng.standard_normal((256, 128)).astype("f4")
    state = {
        "master": master,
        "copy": master.astype(ml_dtypes.bfloat16),
        "w": rng.standard_normal(40_000).astype("f4"),
        "frozen": rng.standard_normal(5000),
    }
    with gpuckpt.Checkpointer(tmp_path / "root", codec="delta", memory="64 MiB") as ckpt:
        for step in (1, 2, 3):
            for name in ("master", "w"):
                state[name].reshape(-1).view("u4")[step::7] += 1
            state["copy"][...] = master.astype(ml_dtypes.bfloat16)
            stats = save(ckpt, step, state)
    assert stats.delta_nbytes
    assert stats.derived_nbytes
    assert stats.unchanged_nbytes
    return tmp_path / "root"


def test_deltas_and_derived_chunks_are_copied_as_they_are(chain):
    done = repaired(chain)
    assert done.is_whole
    wanted, found = gpuckpt.load(chain), loaded(chain)
    assert all(np.array_equal(found[name].view("u1"), wanted[name].view("u1")) for name in wanted)
    entry = entry_of(chain.parent / "to", 3, "w")
    assert entry.chunks[0].base is not None
    assert entry_of(chain.parent / "to", 3, "copy").chunks[0].sources
    assert len(done.written.segments) == 1


def test_a_damaged_base_loses_what_hangs_on_it_and_the_steps_that_need_it_are_named(chain):
    file = rot(chain, 1, "master")
    done = repaired(chain)
    assert sorted(lost_names(done)) == ["copy", "master"]
    for loss in done.lost:
        assert loss.wounds[0].extent.segment == file
        assert loss.also == {1, 2}
        assert loss.older is None
    assert set(loaded(chain)) == {"w", "frozen"}


def test_a_damaged_delta_loses_its_tensor_and_older_steps_still_have_it(chain):
    rot(chain, 3, "w")
    done = repaired(chain)
    assert lost_names(done) == ["w"]
    (loss,) = done.lost
    assert (loss.older or (0,))[0] == 2
    assert loss.also == set()


def test_without_a_manifest_what_older_files_have_is_lost_and_an_older_value_is_offered(chain):
    break_manifest(chain, 3)
    done = repaired(chain)
    assert lost_names(done) == ["frozen"]
    assert (done.lost[0].older or (0,))[0] == 2
    assert set(loaded(chain)) == {"master", "copy", "w"}


def test_a_target_that_has_the_step_or_lies_in_the_root_is_refused(root):
    repaired(root)
    with pytest.raises(gpuckpt.InvalidError, match="has a step 3 already"):
        repair(LocalStore(root), 3, LocalStore(root.parent / "to"))
    for to in (root, root / "below"):
        finished = run("repair", root, "--to", to)
        assert finished.returncode == 2
        assert "give a directory elsewhere" in finished.stderr
    assert not (root / "below").exists()


def test_nothing_intact_is_an_error_and_nothing_is_written(root):
    for name in ("model.w", "model.b", "list.0", "list.1"):
        rot(root, 1, name)
    for step in (2, 3):
        for path in root.glob(f"step-{step:012d}.*"):
            path.unlink()
    rot(root, 1, "frozen")
    with pytest.raises(gpuckpt.NotFoundError, match="nothing can be salvaged"):
        repair(LocalStore(root), 1, LocalStore(root.parent / "to"))
    assert not (root.parent / "to").exists()
    finished = run("repair", root, "--to", root.parent / "to")
    assert finished.returncode == 2
    assert finished.stderr.startswith("gpuckpt: ")
    assert len(finished.stderr.strip().splitlines()) == 1
    assert run("repair", root.parent / "none", "--to", root.parent / "to").returncode == 2


def test_the_command_says_what_is_lost_and_its_exit_code_does(root):
    assert run("repair", root, "--step", 2, "--to", root.parent / "whole").returncode == 0
    file = rot(root, 3, "model.w")
    finished = run("repair", root, "--to", root.parent / "to")
    assert finished.returncode == 1
    for words in ("4 of 5 tensors are intact", "lost: model.w (float64, 30 × 40, 9.4 KiB)", file):  # noqa: RUF001
        assert words in finished.stdout
    assert "step 2 has an older value of it: --fill takes that" in finished.stdout
    assert "4 tensors" in finished.stdout.splitlines()[-2]
    filled = run("repair", root, "--to", root.parent / "filled", "--fill", "--json")
    assert filled.returncode == 1
    facts = json.loads(filled.stdout)
    assert (facts["whole"], facts["lost"], facts["values"]) == (False, [], 3)
    (row,) = facts["filled"]
    assert (row["name"], row["filled"], row["damage"][0]["file"]) == ("model.w", 2, file)
    assert run("verify", root.parent / "to").returncode == 0


def saved_by_two_ranks(root: Path) -> np.ndarray[Any, Any]:
    whole = np.arange(6000.0).reshape(60, 100)

    def work(group: Meeting) -> None:
        own = whole[:35] if group.rank == 0 else whole[35:]
        state = {
            "rows": gpuckpt.Sharded(own, whole.shape, (35 * group.rank, 0)),
            "same": np.arange(500.0),
            "own": gpuckpt.PerRank(np.full(3, group.rank)),
        }
        options: dict[str, Any] = {"group": group, "memory": "64 MiB", "codec": "raw"}
        with gpuckpt.Checkpointer(root, **options) as ckpt:
            ckpt.save(1, state).result(60)

    run_ranks(2, work)
    return whole


def restored_by_two_ranks(root: Path, like: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    def work(group: Meeting) -> dict[str, Any]:
        state = {
            "rows": np.zeros_like(like),
            "same": np.zeros(500),
            "own": gpuckpt.PerRank(np.zeros(3, int)),
        }
        with gpuckpt.Checkpointer(root, group=group, memory="64 MiB") as ckpt:
            ckpt.restore(state, strict=False)
        return state

    return run_ranks(2, work)


def test_what_several_ranks_saved_is_written_as_one_and_ranks_restore_it(tmp_path):
    whole = saved_by_two_ranks(tmp_path / "root")
    done = run("repair", tmp_path / "root", "--to", tmp_path / "new")
    assert (done.returncode, "nothing is lost" in done.stdout) == (0, True)
    for rank, found in enumerate(restored_by_two_ranks(tmp_path / "new", whole)):
        np.testing.assert_array_equal(found["rows"], whole)
        np.testing.assert_array_equal(found["same"], np.arange(500.0))
        np.testing.assert_array_equal(found["own"].value, np.full(3, rank))


def test_a_damaged_shard_costs_its_tensor_alone(tmp_path):
    whole = saved_by_two_ranks(tmp_path / "root")
    tensors = open_step(LocalStore(tmp_path / "root"), 1).tensors
    shard = next(one for one in tensors if one.spec.name == "rows" and one.spec.offset)
    extent = shard.chunks[0].extent
    path = tmp_path / "root" / extent.segment
    data = bytearray(path.read_bytes())
    data[extent.offset] ^= 1
    path.write_bytes(data)
    done = run("repair", tmp_path / "root", "--to", tmp_path / "new")
    assert done.returncode == 1
    assert "rows" in done.stdout
    for rank, found in enumerate(restored_by_two_ranks(tmp_path / "new", whole)):
        assert not found["rows"].any()
        np.testing.assert_array_equal(found["same"], np.arange(500.0))
        np.testing.assert_array_equal(found["own"].value, np.full(3, rank))
