"""Training as a process of its own: started, listened to and, in mid-save, killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpuckpt.demo.settings import Settings

Event = dict[str, Any]
Listener = Callable[[Event], None]

LOOK_SECONDS = 2e-4  # between two looks at a save in flight: the process needs time to get on


class TrainingError(RuntimeError):
    """The training process failed by itself; the message ends with its last words."""


@dataclass(frozen=True, slots=True)
class Job:
    """One training run: the same command starts it and, after a crash, goes on with it."""

    name: str
    directory: Path
    settings: Settings
    saves: bool = True
    arrays: str = "auto"

    @property
    def root(self) -> Path:
        """Where its checkpoints are."""
        return self.directory / self.name

    @property
    def digests(self) -> Path:
        """Where it leaves the digests of its last state."""
        return self.directory / f"{self.name}.digests.json"

    @property
    def log(self) -> Path:
        """Where its standard error goes."""
        return self.directory / f"{self.name}.log"

    def command(self) -> list[str]:
        """Return what starts it, and what starts it again."""
        root = [f"--root={self.root}"] if self.saves else []
        options = [f"--digests={self.digests}", f"--arrays={self.arrays}"]
        module = [sys.executable, "-m", "gpuckpt.demo.train"]
        return [*module, *root, *options, *self.settings.arguments()]


@dataclass(slots=True)
class Record:
    """What one process told while it lived."""

    events: list[Event] = field(default_factory=list)
    killed: Killed | None = None

    def of(self, kind: str) -> list[Event]:
        """Return the events of a kind, in order."""
        return [event for event in self.events if event["event"] == kind]

    def one(self, kind: str) -> Event:
        """Return the only event of a kind."""
        (event,) = self.of(kind)
        return event

    def losses(self) -> dict[int, float]:
        """Return the loss of every step that it trained."""
        return {event["step"]: event["loss"] for event in self.of("step")}


@dataclass(frozen=True, slots=True)
class Killed:
    """A save that SIGKILL cut off: `nbytes` of its files are there, and no manifest."""

    step: int
    nbytes: int
    newest: int  # the newest committed step then, 0 if none


def train(job: Job, listen: Listener, *, kill_from: int | None = None) -> Record:
    """Run `job` to its end, or kill it in mid-save at the first chance from step `kill_from` on.

    Raises:
        TrainingError: it failed by itself.
    """
    record = Record()
    with started(job) as process:
        for event in events(process):
            record.events.append(event)
            listen(event)
            wanted = kill_from is not None and event.get("step", 0) >= kill_from
            if wanted and event["event"] == "saving":
                record.killed = kill_in_mid_save(process, job.root, event["step"])
                if record.killed:
                    listen({"event": "killed", "step": event["step"]})
                    return record
        if process.wait() != 0:
            words = job.log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise TrainingError(f"{job.name}: exit status {process.returncode}\n{words}")
    return record


@contextmanager
def started(job: Job) -> Iterator[subprocess.Popen[str]]:
    """Start the process of `job`; it doesn't outlive the block."""
    environment = os.environ | job.settings.environment()
    with (
        job.log.open("ab") as log,
        subprocess.Popen(  # noqa: S603 (our own module)
            job.command(), stdout=subprocess.PIPE, stderr=log, env=environment, text=True
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def events(process: subprocess.Popen[str]) -> Iterator[Event]:
    """Yield what `process` tells, as it tells it."""
    assert process.stdout is not None
    for line in process.stdout:
        yield json.loads(line)


def kill_in_mid_save(process: subprocess.Popen[str], root: Path, step: int) -> Killed | None:
    """Kill `process` while its save of `step` is in flight, or return None if that is over.

    1. Stop the process.            What is seen next stays true until the signal below.
    2. Look at the files of `step`. A good part of a save's bytes, but no manifest: it is in flight.
    3. Kill it (SIGKILL).           Nothing of it runs between 1 and its end.
    Where there is nothing to see yet, let it go on for a moment and begin again.
    """
    enough = quarter_of_a_save(root)
    while True:
        process.send_signal(signal.SIGSTOP)
        if process.returncode is not None:
            return None
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        nbytes = uncommitted_nbytes(root, step)
        if nbytes is not None and nbytes >= enough:
            process.kill()
            newest = max(committed_steps(root), default=0)
            ours = process.wait() == -signal.SIGKILL
            return Killed(step, nbytes, newest) if ours else None
        process.send_signal(signal.SIGCONT)
        if nbytes is None:
            return None
        time.sleep(LOOK_SECONDS)


def quarter_of_a_save(root: Path) -> int:
    """Return a quarter of the largest earlier save; where they are small, any byte will do."""
    largest = max((path.stat().st_size for path in root.glob("step-*.segment")), default=0)
    return largest // 4 if largest > 4 << 20 else 1


def uncommitted_nbytes(root: Path, step: int) -> int | None:
    """Return how many bytes of `step` lie in `root`, or None if the step is committed."""
    if step in committed_steps(root):
        return None
    return sum(path.stat().st_size for path in root.glob(f"step-{step:012d}.*"))


def committed_steps(root: Path) -> list[int]:
    """Return the steps that have a manifest, in order."""
    suffix = ".manifest.json"
    paths = root.glob(f"step-*{suffix}")
    return sorted(int(path.name.removeprefix("step-").removesuffix(suffix)) for path in paths)
