"""Exporters of saves' figures, as far as they need no library."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.journal import Record
from gpuckpt.metrics import Prometheus, TensorBoard, Wandb, replay
from gpuckpt.metrics.figures import figures
from gpuckpt.stats import Stats

# A line of the text format, as its specification has it.
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\\\|\\"|\\n)*"'
SAMPLE = re.compile(rf"([a-z_]+)(?:\{{({LABEL}(?:,{LABEL})*)\}})? (\S+)")


def record(step: int, error: str | None = None, **figures: Any) -> Record:
    return Record(1000.0 + step, Stats(step, **figures), error)


def samples(text: str) -> dict[str, float]:
    """The samples of a text, each by its name and labels; fails where a line isn't one."""
    found: dict[str, float] = {}
    described: set[str] = set()
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("#"):
            _, kind, name, _ = line.split(" ", 3)
            assert kind + name not in described
            described.add(kind + name)
            continue
        match = SAMPLE.fullmatch(line)
        assert match, line
        assert {f"HELP{match[1]}", f"TYPE{match[1]}"} <= described
        key = line.rpartition(" ")[0]
        assert key not in found
        found[key] = float(match[3])
    return found


def state() -> dict[str, Any]:
    return {"w": np.arange(50_000.0)}


def test_importing_them_imports_none_of_their_libraries():
    libraries = ("tensorboard", "tensorboardX", "opentelemetry", "wandb", "mlflow", "torch")
    program = f"import gpuckpt.metrics, sys; print([m for m in {libraries} if m in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert finished.stdout.strip() == b"[]"


def test_figures_of_a_save_are_its_stats():
    stats: dict[str, Any] = {
        "stall_seconds": 0.5,
        "sync_seconds": 2.0,
        "raw_nbytes": 100,
        "encoded_nbytes": 40,
    }
    found = figures(record(3, **stats))
    assert found["stall_seconds"] == 0.5
    assert found["stage_sync_seconds"] == 2.0
    assert (found["raw_nbytes"], found["ratio"], found["failed"]) == (100, 2.5, 0)
    failed = figures(record(3, "StorageError: full", **stats))
    assert failed["failed"] == 1
    assert "raw_nbytes" not in failed
    assert "ratio" not in failed


def test_prometheus_counts_saves_and_has_the_last_ones_figures():
    told = Prometheus(labels={"run": 'a"b\\c\n'})
    told.saved(record(1, stall_seconds=0.25, written_nbytes=10, slowdown_seconds=3.0))
    told.saved(record(2, "StorageError: full", stall_seconds=0.25, written_nbytes=7))
    told.saved(record(3, stall_seconds=0.5, written_nbytes=20, raw_nbytes=30, encoded_nbytes=20))
    found = samples(told.text())
    run = 'run="a\\"b\\\\c\\n"'
    assert found[f'gpuckpt_saves_total{{{run},outcome="durable"}}'] == 2
    assert found[f'gpuckpt_saves_total{{{run},outcome="failed"}}'] == 1
    assert found[f"gpuckpt_stall_seconds_total{{{run}}}"] == 1.0
    assert found[f"gpuckpt_slowdown_seconds_total{{{run}}}"] == 3.0
    assert found[f"gpuckpt_written_bytes_total{{{run}}}"] == 30
    assert found[f"gpuckpt_last_durable_step{{{run}}}"] == 3
    assert found[f"gpuckpt_last_durable_timestamp_seconds{{{run}}}"] == 1003
    assert found[f'gpuckpt_last_save_bytes{{{run},kind="written"}}'] == 20
    assert found[f'gpuckpt_last_save_seconds{{{run},stage="stall"}}'] == 0.5
    assert found[f"gpuckpt_last_save_ratio{{{run}}}"] == 1.5


def test_before_any_save_prometheus_counts_none():
    found = samples(Prometheus().text())
    assert found['gpuckpt_saves_total{outcome="durable"}'] == 0
    assert "gpuckpt_last_durable_step" not in found


@given(st.dictionaries(st.from_regex(r"\A[a-z]{1,5}\Z"), st.text(), max_size=3))
def test_any_label_value_is_escaped(labels):
    labels.pop("stage", None)
    labels.pop("kind", None)
    found = samples(Prometheus(labels=labels).text())
    assert len(found) == 5


@pytest.mark.parametrize("name", ["", "a-b", "1a", "outcome", "a b"])
def test_a_label_that_cannot_be_one_is_refused(name):
    with pytest.raises(gpuckpt.InvalidError, match="label"):
        Prometheus(labels={name: "x"})


def test_prometheus_file_is_replaced_after_each_save_and_whole_at_any_moment(tmp_path):
    path = tmp_path / "gpuckpt.prom"
    path.write_text("old\n")
    seen: set[int] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            text = path.read_text()
            seen.add(0 if text == "old\n" else len(samples(text)))

    thread = threading.Thread(target=look)
    thread.start()
    told = Prometheus(path)
    for step in range(200):
        told.saved(record(step))
    done.set()
    thread.join()
    assert path.read_text() == told.text()
    assert seen <= {0, len(samples(told.text()))}
    assert [one.name for one in tmp_path.iterdir()] == ["gpuckpt.prom"]


def test_a_file_that_cannot_be_written_fails_no_save(tmp_path, caplog):
    told = Prometheus(tmp_path / "nothing" / "a.prom")
    with gpuckpt.Checkpointer(tmp_path / "run", observers=[told]) as ckpt:
        ckpt.save(1, state()).result()
    assert "failed to take note of step 1" in caplog.text
    assert samples(told.text())["gpuckpt_last_durable_step"] == 1


def test_a_run_and_its_log_tell_the_same(tmp_path):
    live, later = Prometheus(), Prometheus()
    with gpuckpt.Checkpointer(tmp_path, observers=[live], log=True) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, state())
    assert replay(tmp_path, later) == 3
    found, again = samples(live.text()), samples(later.text())
    when = "gpuckpt_last_durable_timestamp_seconds"
    assert found.pop(when) == pytest.approx(again.pop(when), abs=5)
    assert found == pytest.approx(again)


class Scalars:
    """A `SummaryWriter`, as far as that is called."""

    def __init__(self) -> None:
        self.points: list[tuple[str, float, int, float]] = []
        self.flushed = 0

    def add_scalar(self, tag: str, value: float, step: int, when: float, /) -> None:
        self.points.append((tag, value, step, when))

    def flush(self) -> None:
        self.flushed = len(self.points)


def test_a_writer_gets_scalars_at_the_saves_step_and_the_slow_down_of_the_one_before():
    writer = Scalars()
    board = TensorBoard(writer)
    board.saved(record(5, stall_seconds=0.5, slowdown_seconds=0.75))
    board.saved(record(9, slowdown_seconds=1.0))
    assert ("gpuckpt/stall_seconds", 0.5, 5, 1005.0) in writer.points
    slow = [point for point in writer.points if "slowdown" in point[0]]
    assert slow == [("gpuckpt/slowdown_seconds", 0.75, 5, 1005.0)]
    assert writer.flushed == len(writer.points)


class Run:
    """A run of Weights & Biases, as far as that is called."""

    def __init__(self) -> None:
        self.defined: list[tuple[str, str | None]] = []
        self.rows: list[tuple[dict[str, float], bool]] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def log(self, data: dict[str, float], *, commit: bool) -> None:
        self.rows.append((data, commit))


def test_a_run_gets_rows_over_a_step_of_their_own_and_its_rows_are_not_ended():
    run = Run()
    told = Wandb(run)
    told.saved(record(5, stall_seconds=0.5, slowdown_seconds=0.75))
    told.saved(record(9))
    assert run.defined == [("gpuckpt/step", None), ("gpuckpt/*", "gpuckpt/step")]
    (first, _), (second, _) = run.rows
    assert [commit for _, commit in run.rows] == [False, False]
    assert (first["gpuckpt/step"], first["gpuckpt/stall_seconds"]) == (5, 0.5)
    assert "gpuckpt/slowdown_seconds_before" not in first
    assert second["gpuckpt/slowdown_seconds_before"] == 0.75


@pytest.mark.parametrize("made", [TensorBoard, Wandb])
def test_what_is_no_writer_and_no_run_is_refused(made):
    with pytest.raises(gpuckpt.InvalidError, match="takes a"):
        made(3)


@pytest.mark.parametrize("guide", ["metrics.md", "report.md"])
def test_the_guides_code_runs_from_top_to_bottom(tmp_path, guide):
    text = (Path(__file__).parents[1] / "docs" / "guides" / guide).read_text()
    blocks = re.findall(r"(?<!library -->\n)```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    command = [sys.executable, "-W", "error", "-c", "\n".join(blocks)]
    environment = {**os.environ, "PYTHONPATH": str(Path(gpuckpt.__file__).parents[1])}
    finished = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert finished.returncode == 0, finished.stderr
