"""Runs an example as a user would, kills it in the middle, starts it again, and compares ends.

    def test_the_torch_loop_goes_on_bit_for_bit_after_a_kill(wheel, tmp_path):
        check_kill_and_resume("torch_loop", wheel, tmp_path, steps=30, kills=(12,))

An example is started as `python examples/NAME.py --root DIR --steps N` and

- prints `step <n>`, flushed, after every training step;
- has checkpoints in DIR, and resumes by itself if there is one;
- at its end prints `digest <hex>`: of the bytes of its final parameters, in the order of names.

`wheel` is the directory that `tests/examples/conftest.py` installs gpuckpt's wheel into: the
example imports that, and not the checkout.  Every process ends with its `run`, its children too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
# Not of a launcher that runs the tests.
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "SLURM_", "OMPI_", "PMI")


@dataclass
class Run:
    """What one process told: the steps that it printed, and the digest if it came to its end."""

    code: int = 0
    steps: list[int] = field(default_factory=list)
    digest: str | None = None
    output: str = ""


def run(
    name: str,
    wheel: Path,
    root: Path,
    *,
    steps: int,
    kill_after: int | None = None,
    arguments: Sequence[str] = (),
    launcher: Sequence[str] = (),
    timeout: float = 120.0,
) -> Run:
    """Run an example to its end, or kill it once it has told of step `kill_after`.

    It is killed only when a checkpoint is committed by then, and else at the next step.
    `launcher` is what the interpreter is given before the script: a module of the tests.
    """
    script = [*launcher, str(REPOSITORY / "examples" / f"{name}.py")]
    command = [sys.executable, *script, "--root", str(root), "--steps", str(steps), *arguments]
    root.parent.mkdir(parents=True, exist_ok=True)
    errors = root.parent / f"{root.name}.stderr"
    found = Run()
    with errors.open("ab") as stderr, started(command, wheel, root.parent, stderr) as process:
        timer = threading.Timer(timeout, end, [process])
        timer.start()
        try:
            listen(process, found, root, kill_after)
            found.code = process.wait()
        finally:
            timer.cancel()
    found.output += errors.read_text(errors="replace")[-4000:]
    return found


def listen(process: subprocess.Popen[str], found: Run, root: Path, kill_after: int | None) -> None:
    """Read what it tells until it ends, or is to end."""
    assert process.stdout is not None
    for line in process.stdout:
        found.output += line
        word, _, rest = line.strip().partition(" ")
        if word == "digest":
            found.digest = rest
        if word == "step" and rest.isdigit():
            found.steps.append(int(rest))
            if kill_after is not None and int(rest) >= kill_after and has_checkpoint(root):
                end(process)
                return


def has_checkpoint(root: Path) -> bool:
    return any(root.rglob("*.manifest.json"))


@contextlib.contextmanager
def started(command: Sequence[str], wheel: Path, directory: Path, stderr: object):
    """A process that imports from `wheel`, in a session of its own; nothing of it is left."""
    left = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    path = [wheel, REPOSITORY] if "-m" in command else [wheel]  # for a launcher
    # One thread: sums of several are taken in another order each time.
    ours = {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    ours["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # they take longer than the runs
    ours["PYTHONPATH"] = os.pathsep.join(map(str, path))
    # What one process of a test compiles, those after it find: compiling takes half of their time.
    ours |= {"JAX_COMPILATION_CACHE_DIR": str(directory / "compiled")}
    ours |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    process = subprocess.Popen(
        command,
        cwd=directory,
        env=left | ours,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,  # type: ignore[call-overload]
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        end(process)
        process.wait()
        process.stdout.close()


def end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def check_kill_and_resume(
    name: str,
    wheel: Path,
    tmp_path: Path,
    *,
    steps: int,
    kills: Sequence[int],
    arguments: Sequence[str] = (),
    launcher: Sequence[str] = (),
    timeout: float = 120.0,
) -> str:
    """A run that is killed after each of `kills` ends with the bits of one that never was.

    The digest of both; the checkpoints of the one that was killed are in `tmp_path / "killed"`.
    """
    options: Any = {"arguments": arguments, "launcher": launcher, "timeout": timeout}
    whole = run(name, wheel, tmp_path / "whole", steps=steps, **options)
    assert whole.code == 0, whole.output
    assert whole.digest, whole.output
    assert whole.steps[0] == 1, whole.steps

    root, first = tmp_path / "killed", 1
    for kill_after in (*kills, None):
        part = run(name, wheel, root, steps=steps, kill_after=kill_after, **options)
        assert part.steps, part.output
        assert part.steps[0] >= first, part.steps
        if kill_after is not None:
            assert part.code == -signal.SIGKILL, part.output
            assert part.digest is None, "it had ended before it was killed: ask for more steps"
            first = 2  # from the beginning would be no resume
    assert part.code == 0, part.output
    assert part.digest == whole.digest, part.output
    return whole.digest
