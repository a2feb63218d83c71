"""The driver itself, with the smallest example there can be: a loop over a numpy array."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.examples import drive
from tests.examples.drive import check_kill_and_resume, run

LOOP = """
import argparse, hashlib, time
import numpy as np
import gpuckpt

asked = argparse.ArgumentParser()
asked.add_argument("--root")
asked.add_argument("--steps", type=int)
asked.add_argument("--add", type=float, default=0.0)
asked = asked.parse_args()
state = {"w": np.ones(1000)}
with gpuckpt.Checkpointer(asked.root, every=gpuckpt.Every(steps=2)) as ckpt:
    done = ckpt.resume(state)
    state["w"] += asked.add
    for step in range(done + 1, asked.steps + 1):
        with ckpt.update():
            state["w"] *= 1.001
        ckpt.step(step, state)
        print("step", step, flush=True)
        time.sleep(0.005)
print("digest", hashlib.sha256(state["w"].tobytes()).hexdigest())
"""


@pytest.fixture
def loop(tmp_path, monkeypatch):
    """Its path as of an example, in a checkout of its own."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "loop.py").write_text(LOOP)
    monkeypatch.setattr(drive, "REPOSITORY", tmp_path)
    return "loop"


def test_gpuckpt_comes_from_the_wheel_and_not_from_the_checkout(wheel, tmp_path):
    program = "import gpuckpt; print(gpuckpt.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(wheel)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(wheel / "gpuckpt" / "__init__.py")


def test_a_loop_that_is_killed_twice_ends_with_the_same_bits(loop, wheel, tmp_path):
    check_kill_and_resume(loop, wheel, tmp_path, steps=60, kills=(9, 25))


def test_a_loop_that_changes_its_state_at_each_start_is_found_out(loop, wheel, tmp_path):
    with pytest.raises(AssertionError, match="digest"):
        check_kill_and_resume(loop, wheel, tmp_path, steps=60, kills=(9,), arguments=("--add=1",))


def test_an_example_that_fails_says_why(loop, wheel, tmp_path):
    with pytest.raises(AssertionError, match="unrecognized arguments: --unknown"):
        check_kill_and_resume(loop, wheel, tmp_path, steps=9, kills=(3,), arguments=("--unknown",))


def test_an_example_that_hangs_is_ended(loop, wheel, tmp_path):
    found = run(loop, wheel, tmp_path / "a", steps=10**9, timeout=3.0)
    assert found.code == -9
    assert found.digest is None
