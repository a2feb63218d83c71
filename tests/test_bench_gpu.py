"""All that `make bench-gpu` measures runs on the stand-in, on tiny sizes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cuda_on_cpu import standin
from tests.test_bench import bench, is_spread


@pytest.fixture(scope="module")
def on_stand_in(tmp_path_factory):
    """The report of everything that `make bench-gpu` measures, on tiny sizes."""
    reason = standin.available()
    if reason:
        pytest.skip(reason)
    out = tmp_path_factory.mktemp("bench") / "gpu.json"
    done = bench("bench.gpu", "--stand-in", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text("utf-8"))


def rows_of(report: Any, case: str) -> list[dict[str, Any]]:
    found = [row for row in report["results"] if row["case"] == case]
    assert found, case
    return found


def test_figures_of_the_stand_in_are_labelled_so(on_stand_in):
    assert on_stand_in["machine"]["device"] == "stand-in"


def test_limits_are_measured_in_the_same_run(on_stand_in):
    assert on_stand_in["limits"].keys() == {
        *("copy", "to_host", "to_device", "write", "read_cold", "read_warm")
    }
    copies = rows_of(on_stand_in, "device-copy")
    assert on_stand_in["limits"]["copy"] == copies[0]["bytes_per_s"]["max"]
    assert copies[0]["moved_nbytes"] == 2 * copies[0]["nbytes"]
    for case in ("to_host", "to_device", "disk-write", "disk-read-cold", "disk-read-warm"):
        assert is_spread(rows_of(on_stand_in, case)[0]["bytes_per_s"])


@pytest.mark.parametrize("kernel", ["filter", "unfilter", "digest", "gather", "scatter"])
def test_each_kernel_is_a_share_of_a_plain_copy(on_stand_in, kernel):
    rows = rows_of(on_stand_in, kernel)
    if kernel in ("filter", "unfilter", "digest"):
        cases = {(row["width"], row["misaligned"]) for row in rows}
        assert cases == {(width, off) for width in (1, 2, 4, 8) for off in (False, True)}
    for row in rows:
        assert all(is_spread(row[name]) for name in ("seconds", "bytes_per_s", "share_of_copy"))


def test_a_save_says_what_caller_stream_and_steps_paid(on_stand_in):
    rows = rows_of(on_stand_in, "save")
    assert {(row["mode"], row["codec"]) for row in rows} == {
        (mode, codec) for mode in ("copy", "hold") for codec in ("auto", "raw")
    }
    assert len({row["tensors"] for row in rows}) == 2
    for row in rows:
        for name in (
            *("stall_s", "stream_stall_s", "stream_stall_over_copy", "update_s"),
            *("stream_update_s", "staged_share_of_to_host", "background_s"),
            *("step_alone_s", "step_beside_s", "step_beside_over_alone"),
        ):
            assert is_spread(row[name]), name


def test_a_difference_says_what_crossed(on_stand_in):
    rows = rows_of(on_stand_in, "difference")
    assert len(rows) == 3 * 2 * 2
    for row in rows:
        for name in ("crossed", "written", "as_differences", "stall_s", "staged_s", "durable_s"):
            assert is_spread(row[name]), name
        if row["change"] == "one tensor of sixteen":
            assert row["crossed"]["max"] <= 1 / 16


def test_a_restore_is_a_share_of_what_disk_and_bus_need(on_stand_in):
    rows = rows_of(on_stand_in, "restore")
    assert {row["cache"] for row in rows} == {"cold", "warm"}
    for row in rows:
        middle = row["limit_s"] / row["restore_s"]["median"]
        assert row["share_of_limit"]["min"] <= middle <= row["share_of_limit"]["max"]
