"""The benchmark of many ranks has every row, and its simulated ranks say what real ones would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.ranks.growth import exponent
from bench.ranks.layouts import KINDS, inventory, model, roster, shard
from bench.ranks.simulated import Scripted, echoed, rounds_of, written
from bench.ranks.tables import blocks_of, nbytes, seconds
from gpuckpt.boxes import gap, whole_box
from gpuckpt.groups import Group
from gpuckpt.manifest import pack_manifest, unpack_manifest

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def report(tmp_path_factory: Any) -> Any:
    """What the command writes, quickly."""
    directory = tmp_path_factory.mktemp("ranks")
    out = directory / "out.json"
    words = ("--quick", "--directory", str(directory), "--out", str(out))
    command = [sys.executable, "-m", "bench.ranks", *words]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(directory.iterdir()) == [out]
    return json.loads(out.read_text("utf-8"))["results"]


def rows_of(report: Any, case: str, **facts: object) -> list[Any]:
    return [
        row
        for row in report
        if row["case"] == case and all(row[name] == value for name, value in facts.items())
    ]


def test_every_case_has_its_rows(report):
    for case in ("files", "open"):
        found = [(row["kind"], row["ranks"]) for row in rows_of(report, case)]
        assert found == [(kind, ranks) for kind in ("fsdp", "replicated") for ranks in (2, 16)]
    assert {row["kind"] for row in rows_of(report, "share")} == set(KINDS)
    assert [row["ranks"] for row in rows_of(report, "commit")] == [2, 16]
    assert [row["ranks"] for row in rows_of(report, "meeting")] == [2, 4]


def test_a_save_removes_the_files_of_the_oldest_step_and_no_others(report):
    for row in rows_of(report, "commit"):
        assert row["kept_files"] == 2 * (2 * row["ranks"] + 1) + 1  # the lock
        assert row["calls_remove"] >= 2 * row["ranks"] + 1
        assert len(row["given_nbytes"]) == 1  # one round, and all are told how it ended
        assert row["got_nbytes"][0] < 100


def test_a_round_costs_each_rank_one_put_and_rank_0_one_wait_for_each_of_the_others(report):
    for row in rows_of(report, "meeting"):
        assert (row["lead_puts"], row["lead_waits"]) == (1, row["ranks"] - 1)
        assert row["other_puts"] == 1


def test_there_is_a_table_of_each_case(report):
    tables = ["\n".join(lines) for lines in blocks_of(report)]
    assert len(tables) == 6
    assert [len(table.splitlines()) for table in tables[:3]] == [2 + 4, 2 + 4, 2 + 6]


@pytest.mark.parametrize("kind", KINDS)
def test_simulated_ranks_hold_all_of_the_model_and_write_manifests_that_can_be_read(kind):
    shapes = model(1)
    held = [roster(kind, rank, 12, shapes).specs for rank in range(12)]
    for at, (_, shape) in enumerate(shapes):
        assert gap([specs[at].box for specs in held], whole_box(shape)) is None
    manifest = written(inventory(roster(kind, 3, 12, shapes)), 7, 3)
    assert unpack_manifest(pack_manifest(manifest), "") == manifest


@given(st.integers(1, 50), st.integers(1, 60))
def test_shards_are_the_whole_tensor_one_after_the_other(rows, count):
    boxes = [shard((rows, 3), at, count) for at in range(count)]
    assert sum(box.count for box in boxes) == 3 * rows
    assert gap(boxes, whole_box((rows, 3))) is None


def test_rounds_are_played_as_long_as_ranks_say_something():
    def begin(group: Group) -> None:
        first = group.all_gather(b"%d" % group.rank, what="first", timeout=1)
        if len(set(first)) > 1:
            group.all_gather(b"".join(first), what="second", timeout=1)

    assert rounds_of(3, begin, 5) == [[b"0", b"1", b"2"], [b"012"] * 3]


def test_who_is_scripted_counts_what_it_says_and_hears():
    group = Scripted(1, 3, lambda _, data: [data * 2] * 3)
    assert group.all_gather(b"ab", what="x", timeout=1) == [b"abab", b"ab", b"abab"]
    assert (group.given, group.got) == ([2], [10])


def test_an_echo_is_of_files_of_its_own():
    data = json.dumps({"answer": {"part": ["step-1.a.r0.part.json"], "rate": "5%"}}).encode()
    told = [json.loads(one)["answer"]["part"] for one in echoed(3, data)]
    assert told == [[f"step-1.a.r{rank}.part.json"] for rank in range(3)]


@given(st.floats(0.1, 3), st.floats(1e-6, 1e6))
def test_an_exponent_is_found_again(k, scale):
    found = exponent((ranks, scale * ranks**k) for ranks in (4, 16, 64, 256))
    assert found == pytest.approx(k)


def test_one_point_has_no_exponent():
    assert exponent([(4, 1.0), (8, 0.0)]) is None


def test_figures_are_short():
    assert [nbytes(n) for n in (5, 1234, 999_600, 2.5e9)] == ["5 B", "1.23 KB", "1 MB", "2.5 GB"]
    assert [seconds(s) for s in (0.00123, 0.5, 12.345)] == ["1.2 ms", "0.5 s", "12.3 s"]
