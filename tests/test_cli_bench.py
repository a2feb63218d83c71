"""`gpuckpt bench`: that what it measures is there, and adds up."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from gpuckpt.cli import app
from gpuckpt.errors import InvalidError
from gpuckpt.limits.rates import disk_rates, memory_rate
from gpuckpt.limits.run import measure
from gpuckpt.limits.saves import TENSORS, make_state, save_cost


def test_all_is_measured_and_nothing_is_left(tmp_path):
    found = CliRunner().invoke(app, ["bench", str(tmp_path), "--size", "2 MiB", "--json"])
    assert found.exit_code == 0, found.exception
    facts = json.loads(found.stdout)
    rates = {one["what"]: one for one in facts["rates"]}
    assert {"copy memory", "write to the disk", "read from the disk"} <= set(rates)
    assert all(0 < one["worst"] <= one["best"] for one in rates.values())
    assert [(one["codec"], one["busy"]) for one in facts["saves"]] == [
        (codec, busy) for busy in (False, True) for codec in ("auto", "raw", "zstd")
    ]
    for one in facts["saves"]:
        assert one["interval"] > 0
        assert one["interval"] >= one["stall"] / facts["overhead"] / 3
    for name, busy in (("waiting", False), ("busy", True)):
        intervals = [one["interval"] for one in facts["saves"] if one["busy"] == busy]
        assert facts["best"][name]["interval"] == min(intervals)
    assert list(tmp_path.iterdir()) == []


def test_it_says_which_interval_is_allowed(tmp_path):
    found = CliRunner().invoke(app, ["bench", str(tmp_path), "--size", "1 MiB"])
    assert found.exit_code == 0
    assert "1.0 MiB beside a loop that waits: a save every" in found.stdout
    assert "costs 1 % of the time or less" in found.stdout


def test_a_cost_is_that_of_saves_that_wrote_every_byte(tmp_path):
    state = make_state(1 << 20)
    before = {name: one.copy() for name, one in state.items()}
    found = save_cost(tmp_path, state, "raw", busy=False, overhead=0.5, rounds=1)
    assert found.ratio == pytest.approx(1)
    assert found.written_nbytes >= 1 << 20
    assert all(np.array_equal(np.abs(one), np.abs(state[name])) for name, one in before.items())
    assert not list(tmp_path.iterdir())


def test_a_state_is_as_large_as_one_says():
    state = make_state(8 << 20)
    assert len(state) == TENSORS
    assert sum(one.nbytes for one in state.values()) == 8 << 20


def test_rates_count_what_was_moved(tmp_path):
    assert memory_rate(8 << 20, rounds=1).best > 0
    written, read = disk_rates(tmp_path, 8 << 20, rounds=1)
    assert written.best == written.worst > 0
    assert read.best > 0
    assert list((tmp_path / "disk").iterdir()) == []


@pytest.mark.parametrize(
    ("size", "overhead"), [(1 << 60, 0.01), (1 << 19, 0.01), (1 << 21, 0.0), (1 << 21, 1.0)]
)
def test_what_makes_no_sense_or_has_no_room_is_refused(tmp_path, size, overhead):
    with pytest.raises(InvalidError):
        measure(tmp_path, size, overhead)
    with pytest.raises(InvalidError):
        measure(tmp_path / "none", 1 << 21)
    assert list(tmp_path.iterdir()) == []
