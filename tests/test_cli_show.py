"""`gpuckpt show`: trees, and numbers that are counted anew."""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner, Result

import gpuckpt
from gpuckpt.boxes import Box
from gpuckpt.cli import app
from gpuckpt.counting import summarize
from gpuckpt.outlining import tree_of
from gpuckpt.statistics import statistics_of
from gpuckpt.stores.local import LocalStore
from tests.resharding import save_pieces, split


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["show", *map(str, arguments)])


def facts(*arguments: object) -> dict[str, Any]:
    found = run(*arguments, "--json")
    assert found.exit_code == 0, found.exception
    return dict(json.loads(found.stdout))


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    layers = [{"w": rng.standard_normal((20, 10)).astype(np.float32)} for _ in range(3)]
    layers[1]["w"][0, :3] = np.nan, np.inf, 0
    counts = np.arange(-2, 5)
    gpuckpt.save(tmp_path, {"model": {"layers": layers}, "n": counts, "lr": 0.5, "a.b": "x"}, 7)
    return tmp_path


def test_a_tree_sums_up_what_is_below_each_name(root):
    tree = {row["name"]: row for row in facts(root, "--tree")["tree"]}
    assert tree["model"]["tensors"] == tree["model.layers"]["tensors"] == 3
    assert tree["model"]["raw_nbytes"] == 3 * 800
    assert (tree["model"]["nans"], tree["model"]["infs"]) == (1, 1)
    leaves = {row["name"]: row for row in facts(root)["leaves"]}
    norms = [leaves[f"model.layers.{at}.w"]["norm"] for at in range(3)]
    assert tree["model"]["norm"] == pytest.approx(np.linalg.norm(norms))
    assert tree["lr"]["values"] == 1
    assert tree["n"]["norm"] is None


def test_a_tree_is_as_deep_as_one_wants(root):
    lines = run(root, "--depth", 2).stdout.splitlines()
    assert any(line.startswith("  layers") for line in lines)
    assert not any(line.startswith("    0") for line in lines)
    assert any(line.startswith("      w") for line in run(root, "--tree").stdout.splitlines())


def test_names_of_a_tree_are_cut_at_dots_but_for_exact_ones():
    tree = tree_of({"a.b": 1, "a.c": 2, '["a.b"]["c"]': 3, "d": 4})
    assert [(at, one.label) for at, one in tree.walk()] == [
        (0, "a"),
        (1, "b"),
        (1, "c"),
        (0, '["a.b"]["c"]'),
        (0, "d"),
    ]


def test_numbers_are_counted_anew_where_one_asks_for_it(root):
    leaves = {row["name"]: row for row in facts(root, "--compute")["leaves"]}
    whole = gpuckpt.load(root)
    for at in range(3):
        row = leaves[f"model.layers.{at}.w"]
        numbers = whole["model"]["layers"][at]["w"].astype(np.float64)
        finite = numbers[np.isfinite(numbers)]
        assert row["norm"] == pytest.approx(np.linalg.norm(finite))
        assert (row["min"], row["max"]) == (finite.min(), finite.max())
        assert row["mean"] == pytest.approx(finite.mean())
        assert row["zeros"] == np.count_nonzero(numbers == 0)
    assert (leaves["n"]["min"], leaves["n"]["max"], leaves["n"]["mean"]) == (-2, 4, 1)
    assert leaves["model.layers.1.w"]["nans"] == 1
    assert "min" not in leaves["lr"]
    assert "min" not in facts(root)["leaves"][0]


def test_shards_are_counted_once_where_they_overlap(tmp_path):
    whole = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    boxes = [Box((0, 0), (40, 8)), Box((20, 0), (44, 8))]
    save_pieces(LocalStore(tmp_path), split("w", whole, boxes))
    (row,) = facts(tmp_path, "--compute")["leaves"]
    assert row["norm"] == pytest.approx(float(np.linalg.norm(whole)), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e5m2", "complex64", ">f8"])
def test_what_is_counted_is_what_a_save_counts(dtype):
    known = {"bfloat16": ml_dtypes.bfloat16, "float8_e5m2": ml_dtypes.float8_e5m2}
    numbers = np.array([1, 2.5, 0, np.nan, np.inf, -3], known.get(dtype, dtype))
    name = {">f8": ">float64"}.get(dtype, dtype)
    raw = numbers.view(np.uint8)
    found, saved = summarize(raw, name), statistics_of(raw, name)
    assert saved is not None
    assert (found.statistics.nans, found.statistics.infs) == (saved.nans, saved.infs)
    assert found.statistics.squares == pytest.approx(saved.squares)


def test_ten_thousand_tensors_are_a_line_each(tmp_path):
    state = {f"b{at // 100}.p{at % 100}": np.full(2, at, np.float32) for at in range(10_000)}
    gpuckpt.save(tmp_path, state, 1)
    lines = run(tmp_path).stdout.splitlines()
    assert len(lines) == 10_000 + 3
    assert len(run(tmp_path, "--depth", 1).stdout.splitlines()) == 100 + 3


def test_what_belongs_to_earlier_steps_is_told(tmp_path):
    state = {"w": np.ones(100, np.float32), "v": np.ones(100, np.float32)}
    with gpuckpt.Checkpointer(tmp_path, memory="64 MiB") as ckpt:
        ckpt.save(1, state).result(60)
        ckpt.save(2, {**state, "v": state["v"] + 1}).result(60)
    assert "1 file of earlier steps belong" in run(tmp_path).stdout.splitlines()[-1]
