"""The benchmark of training runs: real states, complete rows, and tables made of them."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bench.training import expected, finetuning, table, tables, transformer
from bench.training.cases import CASES, all_runs
from bench.training.rivals import coded, rivals
from bench.training.runs import QUICK, nbytes_of
from bench.training.words import BEGIN, END, PAD, pairs

HERE = Path(__file__).parents[1]
ONLY = ("adam-f32", "adam-masters", "embedding")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The file that the command writes, quickly, of the runs that need nothing but numpy."""
    directory = tmp_path_factory.mktemp("training")
    out = directory / "out.json"
    words = ("--quick", "--only", *ONLY, "--directory", str(directory), "--out", str(out))
    command = [sys.executable, "-m", "bench.training", *words]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in directory.iterdir()] == ["out.json"]
    return out


@pytest.fixture(scope="module")
def report(written) -> Any:
    return json.loads(written.read_text("utf-8"))


def test_every_case_is_saved_whole_and_by_deltas_at_each_interval(report):
    assert tuple(run["name"] for run in report["runs"]) == ONLY
    for run in report["runs"]:
        assert run["facts"]["loss_last_10"] < run["facts"]["loss_first"]
        for case in run["cases"]:
            rows = [row for row in run["rows"] if row["case"] == case["name"]]
            saves = {(row["codec"], row["interval"]) for row in rows}
            whole = {(codec, 1) for codec in ("raw", "auto", "zstd")}
            assert saves == whole | {("delta", interval) for interval in QUICK.intervals}
            assert {row["state_nbytes"] for row in rows} == {case["state_nbytes"]}


def test_a_row_has_all_that_a_save_wrote_and_took(report):
    for row in (row for run in report["runs"] for row in run["rows"]):
        assert row["written_nbytes"] > 0
        assert row["codec"] == "raw" or row["written_nbytes"] < row["state_nbytes"]
        assert 0 < row["encode_cpu_s"] < 2 * row["cpu_s"] + 0.1
        if row["links"] == 0:
            assert row["restore_cpu_s"] > 0
        for other in row.get("rivals", {}).values():
            assert 0 < other["nbytes"] <= row["state_nbytes"]
            assert other["cpu_s"] > 0


def test_deltas_are_in_the_lanes_of_delta_alone_and_rivals_beside_them(report):
    rows = [row for run in report["runs"] for row in run["rows"]]
    assert any(row["delta_nbytes"] for row in rows)
    for row in rows:
        assert row["codec"] == "delta" or not row["delta_nbytes"]
        assert bool(row.get("rivals")) == bool(row["delta_nbytes"])


def test_the_tables_have_a_line_for_each_case_and_interval(written, report):
    command = [sys.executable, "-m", "bench.training.tables", str(written)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cases = [case["name"] for run in report["runs"] for case in run["cases"]]
    for name in cases:
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"| {name} |")]
        assert len(lines) == 1 + 2 * len(QUICK.intervals)
    assert "nan" not in done.stdout


def test_a_range_of_one_number_is_that_number():
    rows = [{"state_nbytes": 30, "written_nbytes": at} for at in (10, 10, 2)]
    assert tables.over(rows, tables.ratio_of) == "3.00\N{EN DASH}15.0"
    assert tables.over(rows[:2], tables.ratio_of) == "3.00"
    assert tables.over([], tables.ratio_of) == "\N{EN DASH}"


def test_a_run_gives_the_same_states_again_in_the_same_arrays():
    (run,) = (run for run in transformer.runs() if run.name == "adam-bf16")
    first = [{name: array.copy() for name, array in state.items()} for state in run.begin(QUICK)]
    states = []
    for state, before in zip(run.begin(QUICK), first, strict=True):
        states.append(state)
        assert all(array.tobytes() == before[name].tobytes() for name, array in state.items())
    assert all(state is states[0] for state in states)
    assert any(first[0][name].tobytes() != first[1][name].tobytes() for name in first[0])
    assert {array.dtype for array in first[0].values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_bfloat16_parameters_are_their_masters_rounded():
    (run,) = (run for run in transformer.runs() if run.name == "adam-masters")
    *_, state = run.begin(QUICK)
    weights = CASES["adam-masters"][1].of(state)
    assert nbytes_of(weights) * 7 == nbytes_of(state)
    for name, array in weights.items():
        master = state[name.replace("model.", "master.")]
        assert array.tobytes() == master.astype(ml_dtypes.bfloat16).tobytes()


def test_a_step_of_the_table_touches_few_rows():
    (run,) = table.runs()
    states = run.begin(QUICK)
    before = next(states)["embedding.weight"].copy()
    changed = (next(states)["embedding.weight"] != before).any(axis=1)
    assert 0 < changed.sum() < 2 * QUICK.table_batch + 1
    assert changed.sum() < len(changed) / 4


def test_the_bound_is_the_entropy_of_the_folded_differences():
    before = {"w": np.zeros(1 << 16, np.uint8).view(np.uint32)}
    state = {"w": before["w"].copy()}
    assert coded(rivals()["bound"], before, state)["nbytes"] == 0
    state["w"][::2] = 1
    bits = 8 * coded(rivals()["bound"], before, state)["nbytes"]
    assert math.isclose(bits, state["w"].size)


def test_texts_are_pairs_of_word_pieces(tmp_path):
    words = ["[PAD]", *(f"unused{at}" for at in range(1, 104)), "re", "##turn", "the", "list"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    left, right = pairs(tmp_path / "vocab.txt", 16, most=50)
    assert left.shape == right.shape == (50, 16)
    for rows in (left, right):
        assert (rows[:, 0] == BEGIN).all()
        assert ((rows == END).sum(axis=1) == 1).all()
        assert (rows < len(words)).all()
    at = right.tolist()
    assert any(row[k : k + 3] == [104, 105, 106] for row in at for k in range(14)), "return the"
    assert all(row[row.index(END) + 1 :] == [PAD] * (15 - row.index(END)) for row in at)


def test_fine_tuning_says_what_it_needs():
    names = [run.name for run in all_runs()]
    there = [importlib.util.find_spec(name) for name in ("torch", finetuning.PACKAGE)]
    assert bool(finetuning.missing()) == (None in there)
    assert ("lora" in names) == (None not in there)


def test_published_weights_learn():
    pytest.importorskip("torch")
    if finetuning.missing():
        pytest.skip(finetuning.missing())
    (run,) = (run for run in finetuning.runs() if run.name == "lora")
    scale = replace(QUICK, warmup=1, intervals=(1,), saves=(2,))
    first, second = ({n: a.copy() for n, a in state.items()} for state in run.begin(scale))
    frozen = [name for name in first if name.startswith("model.")]
    assert all(first[name].tobytes() == second[name].tobytes() for name in frozen)
    assert any((first[name] != second[name]).any() for name in set(first) - set(frozen))
    assert run.facts["loss_first"] < math.log(scale.pairs) / 2, "the weights know the texts already"


def test_a_rule_that_expects_what_comes_leaves_nothing_to_write():
    rng = np.random.default_rng(3)
    old, older = rng.standard_normal((2, 1 << 16)).astype(np.float32)
    three = expected.Three(old, old, np.abs(old))
    look = expected.Look(three, three, expected.Three(older, older, np.abs(older)), 1.0)
    for name in ("v, decayed: the least it can be", "v's bits plus their median difference"):
        part, rule = expected.RULES[name]
        assert expected.delta_nbytes(*rule(look)) < 200
        assert part == 2
    for part, rule in expected.RULES.values():
        now, base = rule(look)
        assert now.nbytes == base.nbytes == look.now[part].nbytes
        assert now.itemsize == base.itemsize == 4
    assert expected.delta_nbytes(old, older) > 3 * old.size
