"""The benchmark beside the peers: its states are real, its rounds fair, its report complete."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.peers import __main__ as command
from bench.peers import embedding, files, report, trained, workloads
from bench.peers.cache import AFTER, BEFORE, digest, open_or_make, open_workload
from bench.peers.catalogue import RIVALS, catalogue, description_of
from bench.peers.limits import LIMITS, limits
from bench.peers.loops import beside, for_seconds, run_until, step_of
from bench.peers.measure import measure
from bench.peers.of_numpy import Savez
from bench.peers.peer import Description
from bench.peers.process import descendants, memory_nbytes, others_share, tree_cpu_seconds
from bench.peers.ratios import figure, paired, rival, select
from bench.peers.rotation import Outcome, Rotation, Task, rotated
from bench.peers.spawn import Spawner
from gpuckpt.demo.model import block_shapes

HERE = Path(__file__).parents[1]
ALONE = [one.name for one in catalogue() if set(one.packages) <= {"numpy", "zstandard", "xxhash"}]


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """Two checkpoints of a small table, a tensor in bfloat16, and one without elements."""

    def make(keep):
        def also(which, arrays):
            head = arrays["head.weight"]
            keep(which, arrays | {"half": head.astype(ml_dtypes.bfloat16), "none": head[:0]})

        return embedding.learn(100_000, also, batch=64)

    return open_or_make(tmp_path_factory.mktemp("cache") / "small", make)


def test_both_checkpoints_come_back_from_the_cache_and_a_changed_tensor_is_named(state):
    again = open_workload(state.directory)
    arrays = again.load(BEFORE)

    assert again.different(arrays, BEFORE) == []
    assert "embedding.weight" in again.different(arrays, AFTER)
    again.fill(arrays, AFTER)
    assert again.different(arrays, AFTER) == []
    arrays["head.weight"][3, 5] += 1
    assert again.different(arrays, AFTER) == ["head.weight"]
    assert len(again.different({}, AFTER)) == len(again.entries)


def test_a_state_is_made_once(state):
    def never(keep):
        raise AssertionError

    assert open_or_make(state.directory, never) == state


def test_a_digest_tells_dtypes_and_shapes_apart():
    zeros = np.zeros(4, np.float32)
    assert digest(zeros) == digest(zeros.copy())
    assert len({digest(zeros), digest(zeros.view(np.int32)), digest(zeros.reshape(2, 2))}) == 3


def test_a_table_learns_and_differs_after_a_step_in_the_rows_of_one_batch(state):
    before, after = state.load(BEFORE), state.load(AFTER)
    changed = (before["embedding.weight"] != after["embedding.weight"]).any(axis=1)

    assert 0 < changed.sum() <= state.facts["rows_of_one_batch"] < state.facts["rows"]
    assert before["embedding.exp_avg_sq"].any(axis=1).mean() > 0.95
    assert state.facts["loss_last_10"] < state.facts["loss_first"]


def test_a_trained_model_learns_and_goes_on_between_its_two_checkpoints(tmp_path):
    made = open_or_make(tmp_path / "f32", lambda keep: trained.train(900_000, keep, steps=12))
    before, after = made.load(BEFORE), made.load(AFTER)

    assert made.facts["loss_last_10"] < made.facts["loss_first"]
    parts = {name.partition(".")[0] for name in after}
    assert parts == {"model", "exp_avg", "exp_avg_sq"}
    assert all((before[name] != array).any() for name, array in after.items())

    half = open_or_make(tmp_path / "half", lambda keep: trained.round_to_bfloat16(made, keep))
    assert 2 * half.nbytes == made.nbytes
    name = "exp_avg.block0.up.weight"
    assert half.load(AFTER)[name].tobytes() == after[name].astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.parametrize("nbytes", [1_000_000, 10**8, 10**9, 4 * 10**9])
def test_a_model_is_about_as_large_as_wanted(nbytes):
    sizes = trained.settings_for(nbytes)
    each = sum(int(np.prod(shape)) for shape in block_shapes(sizes.width).values())
    made = 12 * (each * sizes.depth + 512 * sizes.width)
    assert 0.8 < made / nbytes < 1.25


def test_published_weights_are_read_and_before_them_come_the_same_values_rolled():
    kept = {}
    workloads.published(lambda which, arrays: kept.update({which: dict(arrays)}))
    name = "embeddings.word_embeddings.weight"
    assert kept[AFTER][name].shape == (30522, 384)
    half = kept[AFTER][name].size // 2
    assert (np.roll(kept[BEFORE][name], -half) == kept[AFTER][name]).all()


@pytest.mark.parametrize("name", ALONE)
def test_every_peer_gives_all_figures_and_the_same_bits(state, tmp_path, name):
    figures = measure(description_of(name), state, tmp_path / "files")

    assert figures["blocked_s"] <= figures["free_s"] <= figures["durable_s"]
    assert figures["finished_s"] <= figures["durable_s"]
    assert figures["disk_nbytes"] > state.nbytes / 2
    for one in ("cpu_s", "restore_cold_s", "restore_warm_s", "first_blocked_s"):
        assert figures[one] >= 0
    assert figures.keys() >= {"peak_nbytes", "children_peak_nbytes", "others_share"}


class Wrong(Savez):
    """Restores a tensor with one bit of another."""

    def restore(self, step):
        restored = super().restore(step)
        restored["half"].view(np.uint16)[7] ^= 1
        return restored


class Adopted(Savez):
    """Has the run go on with the arrays that it returns."""

    adopts = True


def test_one_wrong_bit_fails_a_peer(state, tmp_path):
    wrong = Description("wrong", Wrong, "", ())
    with pytest.raises(ValueError, match=r"1 tensors didn't come back as saved, half first"):
        measure(wrong, state, tmp_path / "files")


def test_new_arrays_are_compared_where_a_run_goes_on_with_them(state, tmp_path):
    assert measure(Description("adopted", Adopted, "", ()), state, tmp_path / "files")


@pytest.mark.parametrize("syncs", [False, True])
def test_what_a_peer_leaves_unsynced_is_synced_for_it(state, tmp_path, monkeypatch, syncs):
    synced: list[Path] = []
    monkeypatch.setattr("bench.peers.measure.sync_tree", synced.append)
    peer = dataclasses.replace(description_of("numpy_savez"), syncs=syncs)
    measure(peer, state, tmp_path / "files")
    assert len(synced) == (2 if syncs else 3)  # the two between saves and before the restore


def test_a_tree_is_synced_with_the_directories_that_name_its_files(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"12345")
    (tmp_path / "top").write_bytes(b"1")
    synced: list[Path] = []
    monkeypatch.setattr("bench.peers.files.sync", synced.append)

    files.sync_tree(tmp_path)

    order = [tmp_path / "a/b/file", tmp_path / "a/b", tmp_path / "a", tmp_path / "top", tmp_path]
    assert synced == order
    assert files.nbytes_below(tmp_path) == 6


@pytest.mark.parametrize("name", ["gpuckpt_raw_hold", "clone_thread_numpy"])
def test_a_save_beside_a_loop_says_what_it_took(state, tmp_path, name):
    (tmp_path / "files").mkdir()
    settled = []
    peer = description_of(name).make(state.load(BEFORE), tmp_path / "files")
    figures = beside(peer, "gil", 2, lambda: settled.append(True), undisturbed=0.05)
    peer.close()

    assert settled == [True]
    assert figures["in_flight_s"] >= figures["blocked_s"]
    wall = figures["lost_s"] + figures["steps"] * figures["step_s"]
    assert wall >= figures["in_flight_s"]
    assert figures["steps"] >= 1


def test_a_process_saves_several_times_beside_a_loop_and_each_save_counts(state, tmp_path):
    figures = measure(description_of("numpy_savez"), state, tmp_path / "files", "matmul1", saves=3)

    written = [np.load(tmp_path / "files" / f"step-{step}.npz") for step in (2, 3, 4)]
    assert len(figures["saves"]) == 3
    assert figures["lost_s"] == sorted(one["lost_s"] for one in figures["saves"])[1]
    for name in state.load(BEFORE):
        assert np.array_equal(written[0][name], written[2][name])
    changed = [name for name in written[0].files if (written[0][name] != written[1][name]).any()]
    assert changed


class Broken(Savez):
    """Has nothing to show for its save."""

    def finish(self):
        raise OSError("the disk is full")


def test_a_save_that_fails_beside_a_loop_fails_the_row(state, tmp_path):
    peer = Broken(state.load(BEFORE), tmp_path)
    with pytest.raises(OSError, match="the disk is full"):
        beside(peer, "matmul1", 2, lambda: None, undisturbed=0.02)


def test_a_loop_runs_at_least_one_step(tmp_path):
    lap = run_until(for_seconds(0), Savez({}, tmp_path), step_of("gil"))
    assert lap.steps == 1
    assert lap.mean == lap.seconds


def test_limits_are_measured_on_the_same_bytes(state, tmp_path):
    assert limits(state, tmp_path).keys() == {"memcpy_s", "write_s", "read_cold_s", "read_warm_s"}
    assert list(tmp_path.iterdir()) == []


class Script:
    """A runner whose outcomes are written down; without any, it is quiet and quick."""

    def __init__(self, outcomes: dict[str, list[Outcome]] | None = None) -> None:
        self.outcomes = outcomes or {}
        self.ran: list[str] = []

    def __call__(self, task: Task) -> Outcome:
        self.ran.append(task.peer)
        waiting = self.outcomes.get(task.peer, [])
        return waiting.pop(0) if waiting else Outcome({"durable_s": 1.0, "others_share": 0.0})


def tasks_of(*peers: str) -> list[Task]:
    return [Task("w", peer) for peer in peers]


def loud(share: float, durable: float = 1.0) -> Outcome:
    return Outcome({"durable_s": durable, "others_share": share})


def test_every_round_runs_each_once_and_begins_with_another():
    run = Script()
    rows = list(Rotation(tasks_of(*"abcdef", LIMITS), 3).rows(run))

    rounds = [[row["peer"] for row in rows if row["round"] == at] for at in range(3)]
    assert all(sorted(one) == sorted([*"abcdef", LIMITS]) for one in rounds)
    assert [one[0] for one in rounds] == [LIMITS] * 3
    assert len({one[1] for one in rounds}) == 3


@given(st.lists(st.integers(), unique=True), st.integers(0, 50))
def test_rotating_loses_nothing(peers, at):
    tasks = tasks_of(*map(str, peers))
    assert sorted(rotated(tasks, at), key=str) == sorted(tasks, key=str)


def test_a_row_that_others_disturbed_is_run_again_at_most_twice_and_the_quietest_counts():
    run = Script({"a": [loud(0.9, 9.0), loud(0.4, 4.0), loud(0.6, 6.0)], "b": [loud(0.9)]})
    rows = {row["peer"]: row for row in Rotation(tasks_of("a", "b", "c"), 1).rows(run)}

    assert run.ran == ["a"] * 3 + ["b"] * 2 + ["c"]
    assert rows["a"]["figures"]["durable_s"] == 4.0
    assert (rows["a"]["runs"], rows["a"]["quiet"]) == (3, False)
    assert (rows["b"]["runs"], rows["b"]["quiet"]) == (2, True)
    assert (rows["c"]["runs"], rows["c"]["quiet"]) == (1, True)


def test_a_peer_that_fails_is_reported_and_not_tried_again():
    run = Script({"a": [Outcome(failure="ImportError: no a")]})
    rows = list(Rotation(tasks_of("a", "b"), 3).rows(run))

    assert run.ran.count("a") == 1
    assert [row["failure"] for row in rows if row["peer"] == "a"] == ["ImportError: no a"]
    assert run.ran.count("b") == 3


def test_a_failure_of_a_repeated_row_leaves_the_run_that_there_was():
    run = Script({"a": [loud(0.9, 9.0), Outcome(failure="gone")]})
    (row,) = Rotation(tasks_of("a"), 1).rows(run)
    assert (row["figures"]["durable_s"], row["failure"], row["quiet"]) == (9.0, "", False)


def test_others_have_what_is_left_of_the_busy_time():
    assert others_share(busy=3.0, own=1.0, capacity=4.0) == 0.5
    assert others_share(busy=1.0, own=1.2, capacity=4.0) == 0.0
    assert others_share(busy=1.0, own=0.0, capacity=0.0) == 0.0


def test_the_work_of_children_is_ones_own_while_they_live_and_afterwards():
    busy = "import time, sys\nwhile time.process_time() < 0.2: pass\nprint(flush=True)\ninput()"
    before = tree_cpu_seconds()
    with subprocess.Popen(
        [sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert child.pid in descendants()
        assert memory_nbytes("VmHWM", child.pid) > 0
        assert tree_cpu_seconds() - before >= 0.15
        child.communicate(b"\n")
    assert tree_cpu_seconds() - before >= 0.15
    assert child.pid not in descendants()
    assert memory_nbytes("VmHWM", child.pid) == 0


def row_of(peer: str, at: int, failure: str = "", **figures: float) -> dict[str, Any]:
    return {
        "workload": "w",
        "peer": peer,
        "loop": "",
        "round": at,
        "runs": 1,
        "quiet": True,
        "failure": failure,
        "figures": figures,
    }


def test_ratios_are_of_two_figures_of_the_same_round():
    rows = [
        *(row_of("a", at, durable_s=value) for at, value in enumerate((2.0, 30.0, 5.0))),
        *(row_of("base", at, durable_s=value) for at, value in enumerate((1.0, 10.0))),
        row_of("base", 2, failure="gone"),
    ]
    mine, base = select(rows, "w", "a"), select(rows, "w", "base")

    assert paired(mine, "durable_s", base, "durable_s") == {"min": 2.0, "median": 2.5, "max": 3.0}
    assert paired(mine, "durable_s", {}, "durable_s") is None
    assert figure(mine, "durable_s") == {"min": 2.0, "median": 5.0, "max": 30.0}
    assert figure(mine, "lost_s") is None


def test_the_rival_is_the_first_that_ran():
    rows = [row_of(RIVALS[0], 0, failure="no module"), row_of(RIVALS[1], 0, durable_s=1.0)]
    assert rival(rows, "w", RIVALS) == RIVALS[1]
    assert rival(rows[:1], "w", RIVALS) == ""


def test_a_process_of_its_own_gives_figures_or_says_why_not(state, tmp_path):
    run = Spawner({"small": state}, tmp_path, timeout=60)

    assert run(Task("small", "numpy_savez")).figures["durable_s"] > 0
    assert run(Task("small", "nobody")).failure.startswith("ValueError: no peer is called nobody")
    assert not (tmp_path / "peer").exists()
    late = dataclasses.replace(run, timeout=0.01)(Task("small", "numpy_savez", "gil"))
    assert late.failure.startswith("not done in 0.01 s")


@pytest.mark.parametrize(
    ("text", "nbytes"), [("100MB", 10**8), ("1.5 GB", 15 * 10**8), ("64k", 64_000), ("7", 7)]
)
def test_sizes_are_read(text, nbytes):
    assert command.nbytes_of(text) == nbytes


def test_every_peer_has_a_name_of_its_own_and_says_how_it_is_used():
    names = [one.name for one in catalogue()]
    assert len(set(names)) == len(names)
    assert set(RIVALS) <= set(names)
    assert all(one.how and one.packages for one in catalogue())


def plain(table: str) -> str:
    return table.replace(report.DASH, "..")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """What the command writes: two rounds of two peers, and one save beside each loop."""
    directory = tmp_path_factory.mktemp("peers")
    words = [
        *("--rounds", "2", "--size", "300k", "--workloads", "embedding", "--repeats", "0"),
        *("--only", "clone_thread_numpy", "gpuckpt_raw_hold"),
        *("--cache", str(directory / "cache"), "--directory", str(directory)),
        *("--out", str(directory / "out.json")),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "bench.peers", *words],
        cwd=HERE,
        env=os.environ | {"PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return directory / "out.json"


def test_the_command_reports_machine_versions_and_every_row(out):
    made = json.loads(out.read_text("utf-8"))

    assert made["machine"]["packages"].keys() == {"numpy", "xxhash", "zstandard"}
    assert made["workloads"]["embedding"]["nbytes"] > 100_000
    ran = [(row["peer"], row["round"]) for row in made["rows"] if not row["failure"]]
    peers = ("clone_thread_numpy", "gpuckpt_raw_hold", LIMITS)
    assert sorted(ran) == sorted((peer, at) for peer in peers for at in range(2))
    assert not list(out.parent.glob("peers-*"))


def test_beside_a_loop_every_save_of_a_process_counts():
    def saves(*lost: float) -> dict[str, Any]:
        return {"lost_s": lost[1], "saves": [{"lost_s": one} for one in lost]}

    rows = [row_of("a", at) | {"loop": "gil", "figures": saves(3, 4 + at, 9)} for at in range(2)]
    found = figure(select(rows, "w", "a", "gil"), "lost_s")
    assert found is not None
    assert (found["min"], found["median"], found["max"]) == (3, 4.5, 9)


def test_tables_hold_every_peer_every_failure_and_the_ratios(out, tmp_path, capsys, monkeypatch):
    made = json.loads(out.read_text("utf-8"))
    made["rows"][0]["quiet"] = False
    made["rows"].append(row_of("zipnn", 0, failure="ModuleNotFoundError: no zipnn"))
    one: Any = {"lost_s": 0.5, "in_flight_s": 1.0, "longest_over_step": 3.0, "step_s": 0.01}
    beside_loop: Any = one | {"saves": [one, one | {"lost_s": 0.7}]}
    made["rows"].append(
        row_of("gpuckpt_raw_hold", 0, **beside_loop) | {"loop": "gil", "workload": "embedding"}
    )
    (tmp_path / "in.json").write_text(json.dumps(made), encoding="utf-8")
    written = tmp_path / "RESULTS.md"
    words = ["report", str(tmp_path / "in.json"), "--out", str(written)]
    monkeypatch.setattr(sys, "argv", words)

    report.main()

    text, short = written.read_text("utf-8"), capsys.readouterr().out
    text, short = plain(text), plain(short)
    for table in (text, short):
        assert "\n| clone_thread_numpy |" in table
        assert "1.00 (1.00..1.00)" in table
        assert "\n| gpuckpt_raw_hold |" in table
    assert text.count("| gpuckpt_raw_hold | 2 |") == 3  # two rounds of a save and of restores
    assert "- zipnn on w: ModuleNotFoundError: no zipnn" in text
    assert "Beside a GIL-bound loop:" in text
    assert "| gpuckpt_raw_hold | 2 | 0.6 s (0.5..0.7) |" in text
    (line,) = (line for line in short.splitlines() if line.startswith("| gpuckpt_raw_hold"))
    assert line.split(" | ")[-2:] == ["0.6 s (0.5..0.7)", ".. |"]
    assert made["machine"]["command"] in text
    loud = sum(not row["quiet"] for row in made["rows"])
    assert f"during {loud} of {len(made['rows'])} rows" in text


def test_figures_are_shown_with_their_least_and_most():
    shown = plain(report.seconds({"min": 0.01, "median": 0.0204, "max": 0.5}))
    assert shown == "20.4 ms (10..500)"
    shown = plain(report.seconds({"min": -0.01, "median": 2.0, "max": 123.4}))
    assert shown == "2 s (-0.01..123)"
    assert plain(report.ratio({"min": 1, "median": 1.256, "max": 2})) == "1.26 (1.00..2.00)"
    assert report.seconds(None) == report.ratio(None) == report.DASH
