"""The scaling benchmark has every row; its model's arithmetic is that of a pipeline."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.scaling.extrapolate import on_gpu_gb_s
from bench.scaling.fit import least
from bench.scaling.model import (
    CHUNK_NBYTES,
    Costs,
    Load,
    Machine,
    durable,
    fill,
    mixed,
    share_encoded,
    stages,
    stall,
)
from bench.scaling.profile import MS
from bench.scaling.states import fine_tuning, weights
from bench.scaling.tables import placed

HERE = Path(__file__).parents[1]
COSTS = Costs(1e-3, 1e-6, 5e-3, 1e-4, 1e-4)
MACHINE = Machine(cores=2, copy_gb_s=8, coding_gb_s=2, disk_gb_s=1.5, pcie_gb_s=20)

rates = st.floats(0.1, 1000)
machines = st.builds(Machine, st.integers(1, 128), rates, rates, rates, rates)
loads = st.builds(Load, st.floats(1, 1e12), st.integers(1, 10**6), st.floats(1, 30))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the command writes, quickly."""
    directory = tmp_path_factory.mktemp("scaling")
    out = directory / "out.json"
    words = ("--quick", "--directory", str(directory), "--out", str(out))
    command = [sys.executable, "-m", "bench.scaling", *words]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the model's stall" in done.stdout
    return json.loads(out.read_text("utf-8"))


def rows_of(report: Any, case: str, **facts: object) -> list[Any]:
    found = [
        row
        for row in report["results"]
        if row["case"] == case and all(row[name] == value for name, value in facts.items())
    ]
    assert found, (case, facts)
    return found


def is_spread(value: Any) -> bool:
    return bool(0 <= value["min"] <= value["median"] <= value["max"])


def test_every_size_is_saved_and_restored_in_every_way_beside_the_limits(report):
    for nbytes in (8 << 20, 16 << 20):
        rows = rows_of(report, "size", state_nbytes=nbytes)
        ways = {(row["mode"], row["codec"]) for row in rows}
        assert ways == {("copy", "raw"), ("copy", "auto"), ("copy", "zstd"), ("hold", "raw")}
        for row in rows:
            for name in (
                *("stall_s", "durable_s", "background_s", "cpu_s", "memcpy_s", "write_s"),
                *("read_cold_s", "restore_cold_s", "restore_warm_s", "stall_over_memcpy"),
                *("durable_over_write", "restore_cold_over_read", "stage_filter_s"),
            ):
                assert is_spread(row[name]), name
            written = row["written_over_state"]["median"]
            # What `auto` compresses is what the disk leaves it time for: maybe nothing.
            assert row["codec"] == "auto" or (written < 0.9) == (row["codec"] == "zstd")


def test_tensors_cores_memory_and_chains_have_their_rows(report):
    for mode in ("copy", "hold"):
        assert [row["tensors"] for row in rows_of(report, "count", mode=mode)] == [2, 20, 40]
    assert {row["codec"] for row in rows_of(report, "cores", cores=1)} == {"raw", "auto", "zstd"}
    assert {row["codec"] for row in rows_of(report, "memory")} == {"raw", "zstd"}
    links = rows_of(report, "chain")
    assert [row["links"] for row in links] == [0, 1, 2]
    written = [row["written_nbytes"]["median"] for row in links]
    assert max(written[1:]) < written[0] / 4
    means = [row["mean_written_over_state"] for row in rows_of(report, "chain-period")]
    assert means == sorted(means, reverse=True)


def test_the_profile_has_every_operation_of_its_codec(report):
    by_all = {"fingerprint", "statistics", "sample", "checksum", "copy into the block"}
    for codec, more in (("raw", set()), ("auto", {"split", "zstd"}), ("zstd", {"split", "zstd"})):
        (row,) = rows_of(report, "profile", what="save", codec=codec)
        names = {name.removeprefix(MS) for name in row if name.startswith(MS)}
        assert names == by_all | more
        assert on_gpu_gb_s(row) > row["gb_s_core"]["min"]


def test_the_model_says_how_wrong_it_was_where_it_was_not_fitted(report):
    model = report["model"]
    places = [
        (row["case"], row["codec"], row["state_nbytes"], row["tensors"], row["cores"])
        for row in (*model["fitted_to"], *model["checked"])
    ]
    assert len(set(places)) == len(places)
    errors = [abs(row["durable_s"] - row["durable_model_s"]) for row in model["checked"]]
    assert any(errors)
    for what in ("stall", "durable"):
        assert 0 <= model["errors"][what]["median"] <= model["errors"][what]["worst"]


def test_extrapolated_figures_say_that_nobody_measured_them(report):
    far = report["extrapolation"]
    assert far["not_measured"]
    assert {row["nodes"] for row in far["rows"]} == {1, 1000}
    for row in far["rows"]:
        assert row["durable_s"] >= max(row["stages_s"].values()) == row["stages_s"][row["slowest"]]


def test_tables_are_put_in_the_places_of_those_with_the_same_head():
    new = ["| a | b |\n| --- | --- |\n| 3 | 4 |\n| 5 | 6 |", "a note", "| no | place |\n| --- |"]
    text = "x\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\ny\n\n| a |\n| --- |\n| 1 |\n"
    assert placed(text, new) == f"x\n\n{new[0]}\n\ny\n\n| a |\n| --- |\n| 1 |\n"


@given(loads, machines, st.floats(1, 100))
def test_more_bytes_never_take_less_time(load, machine, times):
    more = replace(load, nbytes=load.nbytes * times)
    for predict in (stall, durable):
        assert predict(more, machine, COSTS) >= predict(load, machine, COSTS)


@given(loads, machines)
def test_a_save_takes_as_long_as_its_slowest_stage_and_not_as_all(load, machine):
    busy = stages(load, machine)
    rest = durable(load, machine, COSTS) - max(busy.values())
    overhead = COSTS.durable_fixed_s + COSTS.durable_tensor_s * load.tensors
    overhead += COSTS.durable_chunk_s * load.nbytes / CHUNK_NBYTES
    expected = stall(load, machine, COSTS) + overhead + fill(load, machine)
    assert math.isclose(rest, expected, rel_tol=1e-6, abs_tol=1e-6)


@given(loads, machines, st.floats(1, 50))
def test_auto_takes_no_longer_than_raw_and_writes_no_more(load, machine, times):
    encoding = replace(machine, coding_gb_s=machine.coding_gb_s / times)
    raw = replace(load, ratio=1)
    written, rates = mixed(load, machine, encoding)
    assert 1 <= written.ratio * (1 + 1e-9) <= load.ratio * (1 + 1e-6)
    before, after = stages(raw, machine), stages(written, rates)
    assert max(after.values()) <= max(before.values()) * (1 + 1e-6)


def test_auto_compresses_as_much_as_the_cores_get_done_while_the_disk_writes():
    raw, encoding = replace(MACHINE, coding_gb_s=4), replace(MACHINE, coding_gb_s=0.5)
    load = Load(8e9, 100, 1.25)
    written, rates = mixed(load, raw, encoding)
    busy = stages(written, rates)
    assert math.isclose(busy["cores"], busy["disk"])
    assert 0 < share_encoded(load, raw, encoding) < 1
    slow_disk = [replace(one, disk_gb_s=0.1) for one in (raw, encoding)]
    assert share_encoded(load, *slow_disk) == 1
    quick_disk = [replace(one, disk_gb_s=50) for one in (raw, encoding)]
    assert share_encoded(load, *quick_disk) == 0


def test_a_faster_stage_helps_only_where_it_is_the_slowest():
    load = Load(64e9, 100)
    assert stages(load, MACHINE) == {"bus": 3.2, "cores": 16.0, "disk": 64 / 1.5}
    quick_bus, quick_disk = replace(MACHINE, pcie_gb_s=50), replace(MACHINE, disk_gb_s=3)
    before = durable(load, MACHINE, COSTS)
    assert durable(load, quick_bus, COSTS) == before
    assert durable(load, quick_disk, COSTS) < before - 20
    assert stages(load, replace(MACHINE, cores=64))["cores"] == 64 / 2 / 8


def test_a_stall_is_a_copy_and_some_work_for_each_tensor():
    assert math.isclose(stall(Load(8e9, 1000), MACHINE, COSTS), 1 + 1e-3 + 1e-3)


def test_several_threads_copy_in_their_share_of_ones_time_and_one_in_its_own():
    costs, one = replace(COSTS, copy_share=0.5), replace(MACHINE, cores=1)
    assert math.isclose(stall(Load(8e9, 1000), MACHINE, costs), 0.5 + 1e-3 + 1e-3)
    assert stall(Load(8e9, 1000), one, costs) == stall(Load(8e9, 1000), one, COSTS)


@given(st.lists(st.floats(0, 10), min_size=2, max_size=2))
def test_what_is_fitted_is_found_again_and_never_negative(costs):
    columns = np.array([[1.0, 10.0], [1.0, 100.0], [1.0, 1000.0]])
    found = least(columns, columns @ np.array(costs), np.ones(3))
    assert np.allclose(found, costs, atol=1e-6)
    assert min(least(columns, -(columns @ np.array(costs)) - 1, np.ones(3))) >= 0


def test_weights_are_seeded_and_a_fine_tuning_step_changes_few_of_them():
    one, other = weights(1 << 16, 4), weights(1 << 16, 4)
    assert all((one[name] == other[name]).all() for name in one)
    states = fine_tuning(1 << 16, 4)
    before = {name: array.copy() for name, array in next(states).items()}
    after = next(states)
    changed = np.mean([(before[name] != after[name]).mean() for name in before])
    assert 0 < changed < 0.2
