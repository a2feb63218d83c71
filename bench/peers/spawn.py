"""Runs a task in a process of its own, and takes away what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.peers.cache import Workload
from bench.peers.loops import THREADS
from bench.peers.rotation import Outcome, Task

BLAS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Spawner:
    """A `Runner`: `workloads` by name, files below `directory`, at most `timeout` seconds each.

    Beside a loop a process saves `saves` times.
    """

    workloads: Mapping[str, Workload]
    directory: Path
    timeout: float
    saves: int = 1

    def __call__(self, task: Task) -> Outcome:
        """Wait for the figures."""
        place = self.directory / "peer"
        out = self.directory / "figures.json"
        log = self.directory / "log.txt"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        out.unlink(missing_ok=True)
        words = {
            "peer": task.peer,
            "loop": task.loop,
            "saves": self.saves,
            "workload": str(self.workloads[task.workload].directory.absolute()),
            "directory": str((place / "files").absolute()),
            "out": str(out.absolute()),
        }
        try:
            ended = self._run(json.dumps(words), task.loop, log)
            if out.exists():
                return Outcome(**json.loads(out.read_text("utf-8")))
            said = log.read_text("utf-8", "replace").strip().splitlines()[-1:]
            return Outcome(failure=" ".join([ended, *said]))
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _run(self, task: str, loop: str, log: Path) -> str:
        threads = dict.fromkeys(BLAS, str(THREADS[loop])) if loop else {}
        command = [sys.executable, "-m", "bench.peers.child", task]
        with log.open("wb") as file:
            child = subprocess.Popen(
                command,
                env=os.environ | threads,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
            try:
                return f"ended with {child.wait(self.timeout)}"
            except subprocess.TimeoutExpired:
                return f"not done in {self.timeout:g} s"
            finally:
                _end_group(child)


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """End what the child leaves: it leads a group of its own, which its children are in."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
