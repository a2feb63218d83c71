"""SIGKILL of a real process at random moments of a real run."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

import gpuckpt

KILLS = 50


def state_at(step: int) -> dict:
    """What the run's state is at `step`, all of it different at every step."""
    rng = np.random.default_rng(step)
    weights = rng.standard_normal(200_000).astype(np.float32)
    table = rng.integers(0, 9, (50, 70))
    return {"model": {"weights": weights, "table": table}, "step": step}


def advance(state: dict, step: int) -> None:
    new = state_at(step)
    for name, array in state["model"].items():
        array[:] = new["model"][name]
    state["step"] = step


def train(root: str, snapshot: str, announce: Connection) -> None:
    """Train for ever, and announce each step that `Pending` says is committed."""
    state = state_at(0)
    with gpuckpt.Checkpointer(
        root,
        every=gpuckpt.Every(steps=1),
        keep=gpuckpt.Keep(last=2),
        snapshot=snapshot,
        chunk_nbytes=64 << 10,
        memory="8 MiB",
    ) as ckpt:
        pending: gpuckpt.Pending | None = None
        for step in range(ckpt.resume(state) + 1, 10**6):
            with ckpt.update():
                advance(state, step)
            before, pending = pending, ckpt.step(step, state)
            if before is not None:  # one save is in flight at a time, so it has ended
                announce.send(before.result().step)


def kill_at_a_random_moment(root: Path, snapshot: str, random_s: float) -> int:
    """Run `train` in a process until it is killed; the last step that it announced."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gpuckpt", "numpy", "tests.test_kill"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=train, args=(str(root), snapshot, sender))
    process.start()
    sender.close()
    assert receiver.poll(60), "nothing was committed in a minute"
    announced: int = receiver.recv()
    time.sleep(random_s)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    try:
        while True:
            announced = receiver.recv()
    except EOFError:
        receiver.close()
    assert process.exitcode == -signal.SIGKILL
    process.close()
    return announced


@pytest.mark.parametrize("snapshot", ["copy", "hold"])
def test_a_killed_run_resumes_from_a_step_that_was_committed_bit_for_bit(tmp_path, snapshot):
    moments = random.Random(snapshot)
    for kill in range(KILLS // 2):
        root = tmp_path / str(kill)
        announced = kill_at_a_random_moment(root, snapshot, moments.uniform(0, 0.06))
        state = state_at(0)

        with gpuckpt.Checkpointer(root) as ckpt:
            step = ckpt.resume(state)

        expected = state_at(step)
        assert step >= announced, "a step that was announced as committed is lost"
        assert state["step"] == step
        for name, array in expected["model"].items():
            assert array.tobytes() == state["model"][name].tobytes(), (kill, step, name)
        left = [p.name for p in root.iterdir() if p.name.endswith((".tmp", ".segment"))]
        named = {name for name in left if f"step-{step:012d}" in name}
        assert named, "the step's own data is there"
        assert len(left) == len(ckpt.steps()), "nothing that a crash left is still there"
