"""The benchmarks run, on tiny sizes, and report what the docs say they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuckpt
from bench import cases, codecs, coding, disturbance, read, small, write
from bench.disk import drop_cache, read_through, write_and_sync
from bench.gpu.scale import GIB, MIB, full
from bench.timing import spread, spreads
from gpuckpt.native import native
from tests.cuda_on_cpu import standin

HERE = Path(__file__).parents[1]


def bench(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *words]
    variables = os.environ | {standin.VARIABLE: ""} | environment
    return subprocess.run(
        *(command,), cwd=HERE, env=variables, capture_output=True, text=True, check=False
    )


def is_spread(value: object) -> bool:
    return isinstance(value, dict) and 0 <= value["min"] <= value["median"] <= value["max"]


def test_a_spread_is_the_least_the_middle_and_the_most():
    assert spread([3.0, 1.0, 9.0]) == {"min": 1.0, "median": 3.0, "max": 9.0}
    assert spreads([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 2.0}]) == {
        "a": {"min": 1.0, "median": 2.0, "max": 3.0},
        "b": {"min": 2.0, "median": 2.0, "max": 2.0},
    }


def test_the_disk_is_written_and_read_whole(tmp_path):
    arrays: list[Any] = [np.arange(1000, dtype=np.float32), np.arange(3, dtype=np.uint8)]
    path = tmp_path / "plain"
    assert write_and_sync(path, arrays) > 0
    drop_cache(tmp_path)
    assert path.read_bytes() == b"".join(array.tobytes() for array in arrays)
    assert read_through(path, room_nbytes=64) > 0


def test_the_pieces_run_under_pytest_benchmark():
    done = bench("pytest", "-q", "bench/micro", "--benchmark-disable", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout


def test_each_way_to_write_stands_beside_the_disks_own_limit(tmp_path):
    row = write.write(tmp_path / "w", 9 << 20)
    for name in ("direct", "cached", "bare"):
        assert is_spread(row[f"{name}_gb_s"])
        assert is_spread(row[f"{name}_cpu_s_gib"])
    assert is_spread(row["direct_over_cached"])
    assert list(tmp_path.glob("*/*")) == []


def test_saves_that_are_cached_stand_beside_those_that_are_not(tmp_path):
    row = write.saves(tmp_path, 1 << 16, 4, "auto")
    for what in ("save", "cpu", "restore"):
        assert is_spread(row[f"{what}_direct_over_cached"])


def test_codecs_stand_beside_raw_and_beside_what_disk_and_cores_allow(tmp_path):
    row = codecs.codecs(tmp_path, 1 << 16, 4)
    for name in codecs.NAMES:
        assert is_spread(row[f"{name}_durable_s"])
        assert is_spread(row[f"{name}_background_over_limit"])
    assert is_spread(row["auto_over_raw"])
    assert row["raw_share"]["median"] == 1 > row["zstd_share"]["median"]
    assert row["kept"] == (row["auto_over_raw"]["median"] <= 1.05)


@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_a_restore_stands_beside_plain_reads(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(read, "ROUNDS", 2)
    row = read.read(tmp_path / "r", 3 << 20, 2, cache)
    for codec in read.CODECS:
        assert row[f"{codec}_over_plain"]["min"] > 0
        assert row[f"{codec}_cpu_s"]["min"] > 0


def test_a_stall_stands_beside_a_memcpy(tmp_path):
    row = cases.stall(tmp_path, 1 << 16, 4)
    assert all(
        is_spread(row[name])
        for name in ("stall_s", "memcpy_s", "stall_over_memcpy", "background_s")
    )
    assert row["kept"] == (row["stall_over_memcpy"]["median"] <= 1.3)


@pytest.mark.parametrize("codec", ["auto", "raw"])
def test_a_round_trip_stands_beside_a_plain_write(tmp_path, codec):
    row = cases.roundtrip(tmp_path, 1 << 16, 4, codec)
    figures = ("save_s", "write_fsync_s", "save_over_write_fsync", "restore_s")
    assert all(is_spread(row[name]) for name in figures)
    assert (row["encoded_over_raw"] < 1) == (codec == "auto")


@pytest.mark.parametrize("mode", ["copy", "hold"])
def test_small_tensors_are_counted_and_their_first_save_is_apart(tmp_path, mode):
    row = small.small_tensors(tmp_path, np.array, "numpy", "cpu", mode, layers=5)
    assert (row["tensors"], row["device"], row["mode"]) == (15, "cpu", mode)
    figures = ("first_stall_s", "stall_s", "thread_cpu_s", "update_s", "background_s", "memcpy_s")
    assert all(is_spread(row[name]) for name in figures)


def test_coding_stands_beside_numpy_and_a_memcpy():
    row = coding.coding(1 << 12, 3)
    figures = {name: value for name, value in row.items() if isinstance(value, dict)}
    assert all(map(is_spread, figures.values()))
    assert ("loops" in row) == (native() is None) == (not figures)
    if figures:
        assert {name.partition(" ")[0] for name in figures} == {
            *("split", "join", "delta", "undelta", "delta_split", "join_undelta"),
            *("pack_sparse", "unpack_sparse", "encode", "decode", "statistics"),
            *("fingerprint", "look"),
        }


@pytest.mark.parametrize("loop", disturbance.LOOPS)
def test_a_loop_and_a_save_beside_it_are_measured_in_turn(tmp_path, monkeypatch, loop):
    monkeypatch.setattr(disturbance, "QUIET_SECONDS", 0.01)
    state, step = cases.state_of(1 << 16, 4), disturbance.step_of(loop)
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        row = disturbance.one_round(ckpt, state, step)
        assert ckpt.steps() == [1, 2]
    assert row["beside_over_alone"] == row["save_beside_s"] / row["save_alone_s"]
    assert row["lost_s"] < row["save_beside_s"] + 1


def test_each_setting_of_a_disturbance_is_a_row(tmp_path):
    out = tmp_path / "out.json"
    words = ("--mib", "1", "--rounds", "1", "--loops", "gil", "--settings", "5/0/2", "0.1/1/1")
    done = bench("bench.disturbance", *words, "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text("utf-8"))["results"]
    assert [row["setting"] for row in rows] == ["5/0/2", "0.1/1/1"]
    assert all(is_spread(row["beside_over_alone"]) for row in rows)


def test_a_report_says_where_and_how_it_was_made(tmp_path):
    out = tmp_path / "out.json"
    done = bench("bench", "--only", "none", "--out", str(out), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    where = json.loads(out.read_text("utf-8"))["machine"]
    assert where.keys() >= {"date", "cpu", "cores", "file_system", "versions", "commit"}
    assert where["command"] == f"python -m bench --only none --out {out}"
    assert "aren't measured" in done.stdout


def test_without_a_gpu_nothing_is_measured_or_tested():
    for module in ("bench.gpu", "tests.cuda.on_gpu"):
        done = bench(module, CUDA_VISIBLE_DEVICES="")
        assert done.returncode == 3, done.stderr
        assert done.stderr.startswith("nothing was ")


def test_the_stand_ins_figures_are_kept_out_of_the_results():
    out = HERE / "bench" / "results" / "stand-in.json"
    done = bench("bench.gpu", "--stand-in", "--out", str(out))
    assert done.returncode == 2
    assert "aren't results" in done.stderr
    assert not out.exists()


def test_a_state_leaves_room_for_its_copy_and_on_the_disk():
    assert full(80 * GIB, 1000 * GIB).states_nbytes == (64 * MIB, 512 * MIB, 4 * GIB, 8 * GIB)
    assert full(1 * GIB, 1000 * GIB).states_nbytes == (64 * MIB, 409 * MIB)
    assert full(80 * GIB, 3 * GIB).states_nbytes == (64 * MIB, 512 * MIB, GIB)
