"""`gpuckpt diff`, and what it is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner, Result

import gpuckpt
from gpuckpt.boxes import Box
from gpuckpt.cli import app
from gpuckpt.cli.differing import parse_place
from gpuckpt.commit import open_step
from gpuckpt.comparing import Side
from gpuckpt.differing import diff
from gpuckpt.errors import AuthenticationError, CorruptError, InvalidError, NotFoundError
from gpuckpt.stores.local import LocalStore
from tests.resharding import divided, save_pieces, split


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["diff", *map(str, arguments)])


def facts(*arguments: object) -> dict[str, Any]:
    found = run(*arguments, "--json")
    assert found.exit_code == 0, found.exception
    return dict(json.loads(found.stdout))


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def sides(root: Path, one: int, other: int) -> tuple[Side, Side]:
    store = LocalStore(root)
    return Side(store, open_step(store, one)), Side(store, open_step(store, other))


@pytest.fixture
def root(tmp_path):
    state = {"w": normal(300, 100), "same": normal(50), "old": normal(3), "lr": 0.1, "text": "a"}
    gpuckpt.save(tmp_path, state, 100)
    state["w"] = state["w"] + np.float32(0.5)
    state["lr"] = 0.2
    state["new"] = normal(4)
    del state["old"]
    gpuckpt.save(tmp_path, state, 200)
    return tmp_path


def test_it_says_what_moved_and_by_how_much(root):
    found = facts(root, "--steps", 100, 200)
    rows = {row["name"]: row for row in found["changes"]}
    assert {name: row["kind"] for name, row in rows.items()} == {
        "w": "moved",
        "lr": "moved",
        "new": "added",
        "old": "removed",
    }
    by = rows["w"]["by"]
    assert by["count"] == 30_000
    assert by["largest"] == pytest.approx(0.5, rel=1e-6)
    norm = np.linalg.norm(normal(300, 100).astype(np.float64))
    assert by["relative"] == pytest.approx(0.5 * np.sqrt(30_000) / norm, rel=1e-5)
    assert (rows["lr"]["before"], rows["lr"]["after"]) == (0.1, 0.2)
    assert found["different"]
    assert found["counts"]["equal"] == 2


def test_it_prints_a_table_and_sentences(root):
    found = run(root)
    assert found.exit_code == 0
    assert f"step 100 of {root} → step 200 of {root}" in found.stdout
    assert "lr: 0.1 → 0.2" in found.stdout
    assert "new: added, float32 4" in found.stdout
    assert "old: removed, was float32 3" in found.stdout
    assert "same" not in found.stdout
    assert "same: equal" in run(root, "--equal").stdout


def test_the_exit_code_tells_only_if_it_is_asked_to(root):
    assert run(root).exit_code == 0
    assert run(root, "--exit-code").exit_code == 1
    assert run(f"{root}@100", f"{root}@100", "--exit-code").exit_code == 0


def test_steps_are_named_in_several_ways(root):
    gpuckpt.save(root, {"w": normal(3)}, 300)
    for arguments in [(f"{root}@200",), (root, "--steps", "100", "200")]:
        found = facts(*arguments)
        assert (found["before"]["step"], found["after"]["step"]) == (100, 200)
    assert facts(f"{root}@100", f"{root}@300")["after"]["step"] == 300
    assert facts(f"{root}@100", root)["after"]["step"] == 300


def test_roots_may_be_urls(root):
    found = facts(f"{root.as_uri()}@100", f"{root.as_uri()}@200", "--names", "w")
    assert [row["name"] for row in found["changes"]] == ["w"]


def test_a_sealed_root_is_read_with_its_key_alone(tmp_path):
    key, other = tmp_path / "key", tmp_path / "other"
    key.write_bytes(b"k" * 32)
    other.write_bytes(b"o" * 32)
    for step in (1, 2):
        gpuckpt.save(tmp_path / "run", {"w": normal(9) * step}, step, key=key)
    assert facts(tmp_path / "run", "--key-file", key)["different"]
    found = run(tmp_path / "run", "--key-file", other)
    assert isinstance(found.exception, AuthenticationError)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (("{root}@100",), NotFoundError),
        (("{root}@150",), NotFoundError),
        (("{root}", "{root}@100", "--steps", "100", "200"), InvalidError),
        (("{root}@100", "--steps", "100", "200"), InvalidError),
        (("{root}", "--names", "nothing"), NotFoundError),
        (("{root}/none",), NotFoundError),
    ],
)
def test_what_cannot_be_compared_is_told(root, arguments, kind):
    found = run(*(one.format(root=root) for one in arguments))
    assert isinstance(found.exception, kind)


def test_a_place_may_have_an_at_in_its_name(tmp_path):
    odd = tmp_path / "run@7"
    odd.mkdir()
    assert parse_place(str(odd)) == (str(odd), None)
    assert parse_place(f"{odd}@3") == (str(odd), 3)
    assert parse_place("sftp://user@host/run") == ("sftp://user@host/run", None)
    assert parse_place("s3://bucket/run@12") == ("s3://bucket/run", 12)


def test_names_pick_leaves_of_either_side(root):
    assert [row["name"] for row in facts(root, "--names", "old")["changes"]] == ["old"]
    assert [row["name"] for row in facts(root, "--names", "new")["changes"]] == ["new"]
    assert facts(root, "--names", "same")["changes"] == []


def test_equal_tensors_are_not_read_and_of_others_only_what_differs(tmp_path):
    state = {"w": normal(1024, 1024), "same": normal(1024, 1024, seed=1)}
    with gpuckpt.Checkpointer(tmp_path, chunk_nbytes=1 << 20, memory="64 MiB") as ckpt:
        ckpt.save(1, state).result(60)
        with ckpt.update():
            state["w"][0, 0] += 1
        ckpt.save(2, state).result(60)
    done: list[int] = []
    (change, _) = diff(*sides(tmp_path, 1, 2), progress=done.append)
    assert sum(done) == 1 << 20
    assert change.by is not None
    assert change.by.changed == 1
    assert change.by.count == 1 << 20
    whole = normal(1024, 1024).astype(np.float64)
    assert change.by.relative == pytest.approx(1 / np.linalg.norm(whole), rel=1e-5)


def test_other_chunks_and_codecs_compare_by_what_they_hold(tmp_path):
    state = {"w": normal(700, 300), "n": np.arange(100_000), "s": np.float32(1).reshape(())}
    roots = [tmp_path / name for name in ("a", "b")]
    for where, chunk, codec in zip(roots, (64 << 10, 96 << 10), ("raw", "zstd"), strict=True):
        with gpuckpt.Checkpointer(where, chunk_nbytes=chunk, codec=codec) as ckpt:
            ckpt.save(1, state).result(60)
    assert facts(*roots)["changes"] == []
    state["w"] = state["w"].copy()
    state["w"][699, 299] += 1
    gpuckpt.save(roots[1], state, 2)
    (row,) = facts(*roots)["changes"]
    assert row["by"]["changed"] == 1
    assert row["by"]["largest"] == pytest.approx(1, rel=1e-5)


def test_types_and_shapes_that_differ_are_told_and_numbers_compared(tmp_path):
    wide = normal(64, 8)
    gpuckpt.save(tmp_path, {"w": wide, "v": wide, "x": 1, "same": 1, "z": wide}, 1)
    narrow = wide.astype(ml_dtypes.bfloat16)
    gpuckpt.save(tmp_path, {"w": narrow, "v": wide[:3], "x": wide, "same": 1.0, "z": wide + 0j}, 2)
    rows = {row["name"]: row for row in facts(tmp_path)["changes"]}
    kinds = {name: row["kind"] for name, row in rows.items()}
    assert kinds == {
        "w": "retyped",
        "v": "reshaped",
        "x": "retyped",
        "same": "moved",
        "z": "retyped",
    }
    by = rows["w"]["by"]
    assert by["largest"] == np.abs(narrow.astype(np.float64) - wide).max()
    assert "by" not in rows["v"]
    assert "by" not in rows["z"]
    assert (rows["x"]["before"], rows["x"]["after"]["dtype"]) == (1, "float32")


def test_nans_that_came_are_told(tmp_path):
    state = {"w": normal(100)}
    gpuckpt.save(tmp_path, state, 1)
    state["w"][3] = np.nan
    gpuckpt.save(tmp_path, state, 2)
    (row,) = facts(tmp_path)["changes"]
    assert row["by"]["became_not_finite"] == 1
    assert "1 lost" in run(tmp_path).stdout


def test_equal_values_are_equal_as_they_are_saved(tmp_path):
    gpuckpt.save(tmp_path, {"nan": float("nan"), "one": 1, "none": None, "big": 10**5000}, 1)
    gpuckpt.save(tmp_path, {"nan": float("nan"), "one": True, "none": None, "big": 10**5000}, 2)
    assert [row["name"] for row in facts(tmp_path)["changes"]] == ["one"]


def test_a_tied_tensor_is_compared_once_and_told_by_both_names(tmp_path):
    for step in (1, 2):
        one = normal(200, 200, seed=step)
        gpuckpt.save(tmp_path, {"a": one, "b": one}, step)
    done: list[int] = []
    a, b = diff(*sides(tmp_path, 1, 2), progress=done.append)
    assert a.by == b.by
    assert sum(done) == 200 * 200 * 4


def test_of_many_tensors_those_that_moved_most_are_shown(tmp_path):
    state = {f"w{at:03}": np.ones(4, np.float32) for at in range(100)}
    gpuckpt.save(tmp_path, state, 1)
    state = {name: one + np.float32(1e-3 * at) for at, (name, one) in enumerate(state.items())}
    gpuckpt.save(tmp_path, state, 2)
    short = run(tmp_path).stdout
    assert "w099" in short
    assert "w050" not in short
    assert "and 59 that moved less" in short
    assert "w001" in run(tmp_path, "--all").stdout


def test_damage_is_told_and_not_compared(root):
    (segment,) = root.glob("step-000000000200.*.segment")
    data = bytearray(segment.read_bytes())
    data[1000] ^= 1
    segment.write_bytes(data)
    assert isinstance(run(root).exception, CorruptError)


def test_shards_compare_however_they_are_cut(tmp_path):
    whole = normal(96, 40)
    for step, ways in ((1, {0: 2}), (2, {0: 3, 1: 2})):
        value = whole + np.float32(step == 2)
        save_pieces(LocalStore(tmp_path), split("w", value, divided(whole.shape, ways)), step)
    (row,) = facts(tmp_path)["changes"]
    assert (row["name"], row["by"]["count"]) == ("w", 96 * 40)
    assert row["by"]["largest"] == pytest.approx(1, rel=1e-6)


def test_shards_that_overlap_are_counted_once(tmp_path):
    whole = normal(64, 8)
    boxes = [Box((0, 0), (40, 8)), Box((20, 0), (44, 8))]
    for step in (1, 2):
        save_pieces(LocalStore(tmp_path), split("w", whole * step, boxes), step)
    (row,) = facts(tmp_path)["changes"]
    assert row["by"]["count"] == 64 * 8
    assert row["by"]["relative"] == pytest.approx(1)


def test_a_tensor_of_which_a_part_is_elsewhere_is_not_compared(tmp_path):
    whole = normal(64, 8)
    boxes = divided(whole.shape, {0: 2})
    for step in (1, 2):
        save_pieces(LocalStore(tmp_path), split("w", whole * step, boxes)[:step], step)
    with pytest.raises(NotFoundError, match="gpuckpt merge"):
        diff(*sides(tmp_path, 1, 2))
