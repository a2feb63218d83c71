"""`gpuckpt watch`, and what it knows of a run from outside."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import gpuckpt
from gpuckpt.cli import app
from gpuckpt.errors import InvalidError, NotFoundError
from gpuckpt.journal import Journal
from gpuckpt.overview import Lookout
from gpuckpt.stats import Stats
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.memory import MemoryStore


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["watch", *map(str, arguments)])


def facts(*arguments: object) -> dict[str, Any]:
    found = run(*arguments, "--json")
    assert found.exit_code == 0, found.exception
    return dict(json.loads(found.stdout))


def save_some(root: Path, steps: Iterable[int], **options: Any) -> None:
    state = {"w": np.zeros(1000, np.float32)}
    with gpuckpt.Checkpointer(root, memory="64 MiB", **options) as ckpt:
        for step in steps:
            with ckpt.update():
                state["w"] += 1
            ckpt.save(step, state).result(60)


def log_saves(path: Path, *saves: tuple[int, float, BaseException | None]) -> None:
    journal = Journal(path)
    for step, stall, error in saves:
        stats = Stats(step, stall_seconds=stall, background_seconds=1 + stall, raw_nbytes=100)
        stats.encoded_nbytes = stats.written_nbytes = 50
        journal.append(stats, error)


def test_a_frame_has_the_last_saves_with_what_they_cost(tmp_path):
    save_some(tmp_path, range(10, 60, 10), log=True, keep=gpuckpt.Keep(last=2))
    found = facts(tmp_path)
    assert [(one["step"], one["state"]) for one in found["saves"]] == [
        *((step, "gone") for step in (10, 20, 30)),
        *((step, "committed") for step in (40, 50)),
    ]
    last = found["saves"][-1]
    assert last["stall"] >= 0
    assert last["background"] > 0
    assert last["bottleneck"]
    assert found["newest"] == 50
    assert found["free_nbytes"] > 0
    assert found["pace"] > 0
    assert found["step_rate"] == pytest.approx(10 / found["pace"], rel=0.9)
    assert found["due"] == pytest.approx(last["ended"] + found["pace"])
    shown = run(tmp_path, "--once").stdout
    assert f"{tmp_path.name}: 2 committed, the newest is step 50" in shown
    assert "a save every" in shown
    assert len(facts(tmp_path, "--last", 2)["saves"]) == 2


def test_a_root_without_a_log_is_told_from_its_manifests(tmp_path):
    save_some(tmp_path, (1, 2))
    found = facts(tmp_path)
    assert [(one["step"], one["stall"], one["raw_nbytes"]) for one in found["saves"]] == [
        (1, None, 4000),
        (2, None, 4000),
    ]
    shown = run(tmp_path, "--once").stdout
    assert "no log" in shown
    assert "stall" not in shown


def test_a_log_elsewhere_is_read_if_it_is_named(tmp_path):
    save_some(tmp_path / "run", (1, 2), log=tmp_path / "log.jsonl")
    assert facts(tmp_path / "run")["logs"] == 0
    found = facts(tmp_path / "run", "--log", tmp_path / "log.jsonl")
    assert found["logs"] == 1
    assert all(one["stall"] is not None for one in found["saves"])


def test_ranks_logs_are_taken_together_by_the_slowest(tmp_path):
    log_saves(tmp_path / "saves.jsonl", (1, 0.1, None), (2, 0.3, None))
    log_saves(tmp_path / "saves.r1.jsonl", (1, 0.2, None), (2, 0.1, OSError("no room")))
    first, second = facts(tmp_path)["saves"]
    assert (first["ranks"], first["stall"], first["background"]) == (2, 0.2, 1.2)
    assert (first["raw_nbytes"], first["written_nbytes"]) == (200, 100)
    assert (second["stall"], second["state"]) == (0.3, "failed")
    assert "no room" in second["error"]
    assert "step 2 failed" in run(tmp_path, "--once").stdout


def test_a_step_that_is_written_is_told(tmp_path):
    save_some(tmp_path, (1,))
    (tmp_path / "step-000000000002.00000000.r0.0.segment").write_bytes(bytes(500))
    assert facts(tmp_path)["writing"] == [{"step": 2, "nbytes": 500}]
    assert "step 2 isn't committed yet: 500 B" in run(tmp_path, "--once").stdout


def test_what_cannot_be_read_is_told_beside_the_rest(tmp_path):
    save_some(tmp_path, (1, 2))
    path = tmp_path / "step-000000000001.manifest.json"
    path.write_bytes(path.read_bytes()[:-5])
    found = facts(tmp_path)
    assert [one["step"] for one in found["saves"]] == [2]
    assert "step-000000000001" in found["problem"]


def test_what_there_is_not_is_told(tmp_path):
    assert isinstance(run(tmp_path).exception, NotFoundError)
    assert isinstance(run(tmp_path, "--every", "0").exception, InvalidError)


class RecordingStore(MemoryStore):
    """Takes note of what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Read, and take note."""
        self.reads.append(name)
        super().read_into(name, offset, buffer)


def test_what_was_read_is_not_read_again():
    store = RecordingStore()
    state = {"w": np.zeros(10, np.float32)}
    for step in (1, 2):
        gpuckpt.save("anywhere", state, step, store=store)
    lookout = Lookout(store)
    first = lookout.look()
    store.reads.clear()
    assert lookout.look().saves == first.saves
    assert not store.reads
    gpuckpt.save("anywhere", state, 3, store=store)
    store.reads.clear()
    assert [one.step for one in lookout.look().saves] == [1, 2, 3]
    assert set(store.reads) == {"step-000000000003.manifest.json"}


def test_a_log_that_has_grown_is_read_again(tmp_path):
    lookout = Lookout(LocalStore(tmp_path))
    log_saves(tmp_path / "saves.jsonl", (1, 0.1, None))
    assert [one.step for one in lookout.look().saves] == [1]
    log_saves(tmp_path / "saves.jsonl", (2, 0.1, None))
    assert [one.step for one in lookout.look().saves] == [1, 2]


def test_the_pace_leaves_out_a_restart(tmp_path):
    state, store = {"w": np.zeros(10, np.float32)}, LocalStore(tmp_path)
    for step in (100, 10):
        gpuckpt.save(tmp_path, state, step)
    found = Lookout(store).look()
    assert (found.pace, found.due) == (None, None)


def test_a_terminal_shows_frames_until_ctrl_c_and_ends_quietly(tmp_path):
    save_some(tmp_path, (1,), log=True)
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("COLUMNS", None)
    command = [sys.executable, "-m", "gpuckpt", "watch", str(tmp_path), "--every", "0.1"]
    with subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    ) as process:
        try:
            os.set_blocking(screen, False)
            seen, end = b"", time.monotonic() + 60
            while seen.count(b": 1 committed") < 2 and time.monotonic() < end:
                time.sleep(0.02)
                with contextlib.suppress(BlockingIOError):
                    seen += os.read(screen, 1 << 16)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert seen.count(b": 1 committed") >= 2
    assert b"Traceback" not in seen
    for descriptor in (screen, terminal):
        os.close(descriptor)
