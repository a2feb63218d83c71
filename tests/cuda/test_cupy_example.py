"""The example for CuPy, over whatever device there is: killed, it ends with the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.gates import mode_of

REPOSITORY = Path(__file__).parents[2]
STEPS, KILLED_AFTER = 40, 13


def told(root: Path, standin: bool, kill_after: int | None = None) -> tuple[list[int], str, int]:
    """The steps and the digest that one process prints; it is killed once it has a checkpoint."""
    started = ["-m", "tests.cuda_on_cpu.standin", "examples.cupy_loop"]
    command = started if standin else ["-m", "examples.cupy_loop"]
    process = subprocess.Popen(
        [sys.executable, *command, "--root", str(root), "--steps", str(STEPS)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])},
        stdout=subprocess.PIPE,
        text=True,
    )
    steps, digest = [], ""
    try:
        assert process.stdout is not None
        for line in process.stdout:
            word, _, rest = line.strip().partition(" ")
            digest = rest if word == "digest" else digest
            steps += [int(rest)] if word == "step" else []
            if kill_after and steps and steps[-1] >= kill_after and committed(root):
                process.kill()
                break
        code = process.wait(timeout=60)
    finally:
        process.kill()
        process.communicate()
    return steps, digest, code


def committed(root: Path) -> bool:
    return any(root.glob("*.manifest.json"))


def test_the_cupy_loop_goes_on_bit_for_bit_after_a_kill(
    standin_settings: dict[str, Any] | None, tmp_path: Path
) -> None:
    standin = standin_settings is not None
    if standin_settings is not None and mode_of(standin_settings) != "lazy":
        pytest.skip("one mode of the stand-in does it")
    whole, digest, _ = told(tmp_path / "whole", standin)
    assert whole == list(range(1, STEPS + 1))
    _, _, code = told(tmp_path / "killed", standin, KILLED_AFTER)
    assert code == -signal.SIGKILL
    rest, again, _ = told(tmp_path / "killed", standin)
    assert 1 < rest[0] <= STEPS
    assert rest[-1] == STEPS
    assert digest
    assert again == digest
