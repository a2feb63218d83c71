"""How runs with tiers end: told to, by themselves, by Ctrl-C, by a kill; what is up is whole."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import gpuckpt
from gpuckpt import Keep, Tier
from gpuckpt.commit import steps
from gpuckpt.resources import Resources
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.memory import MemoryStore
from gpuckpt.verify import verify_step
from tests.crash_histories import Life, uploading
from tests.crash_store import CrashStore
from tests.test_checkpointer import SlowStore
from tests.test_interrupts import interrupted_after
from tests.test_tiers import KEEP, Run, damage, outcomes, told, whole
from tests.versions import version_of


class Near(MemoryStore):
    root = "near"


class Slow(SlowStore):
    root = "slow"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuckpt.uploader.PAUSES_SECONDS", (0.001, 0.01))


# Told to end


def preempted(run: Run, step: int) -> gpuckpt.Preemption:
    signal.raise_signal(signal.SIGUSR1)
    run.state["version"] = 0
    run.ckpt.step(step, run.state)
    outcome = run.ckpt.preemption
    assert outcome is not None
    return outcome


def test_the_last_step_goes_up_within_the_grace_and_it_says_where_it_is():
    with Run(Near(), preempt=signal.SIGUSR1) as run:
        run.save(1)
        outcome = preempted(run, 2)
        assert (outcome.saved, outcome.newest, outcome.tiers) == (True, 2, ("near", "memory"))
        assert steps(run.far) == [1, 2]


def test_a_slow_tier_keeps_nobody_beyond_the_grace():
    with Run(Near(), Slow(), preempt=signal.SIGUSR1, grace=1) as run:
        outcome = preempted(run, 1)
        assert (outcome.saved, outcome.tiers) == (True, ("near",))
        assert steps(run.far) == []


def test_what_was_left_out_goes_up_if_the_machine_is_to_go():
    with Run(Near(), preempt=signal.SIGUSR1, tier={"every": 10}) as run:
        assert outcomes(run.save(1)) == ["left out"]
        outcome = preempted(run, 1)
        assert outcome.tiers == ("near", "memory")
        assert steps(run.far) == [1]


def test_what_was_left_out_goes_up_in_the_place_of_an_older_one_on_its_way():
    far = Slow()
    every = gpuckpt.Every(steps=10)
    with Run(Near(), far, preempt=signal.SIGUSR1, grace=30, tier={"every": every}) as run:
        run.save(10, up=False)
        assert far.reached.wait(30)
        run.save(11, up=False)
        hurry = run.ckpt._tiers._each[0].hurry

        def hurry_and_open(left: float) -> None:
            hurry(left)
            far.gate.set()

        with mock.patch.object(run.ckpt._tiers._each[0], "hurry", hurry_and_open):
            outcome = preempted(run, 11)
        assert (outcome.tiers, steps(far)) == (("near", "slow"), [11])


def test_an_older_step_on_its_way_gives_way_to_the_last_if_nobody_knows_that_both_are_in_time():
    far = Slow()
    with Run(Near(), far, preempt=signal.SIGUSR1, grace=30, full_every=1) as run:
        first = run.save(1, up=False)
        assert far.reached.wait(30)
        hurry = run.ckpt._tiers._each[0].hurry

        def hurry_and_open(left: float) -> None:
            hurry(left)
            far.gate.set()

        with mock.patch.object(run.ckpt._tiers._each[0], "hurry", hurry_and_open):
            outcome = preempted(run, 2)
        assert outcome.tiers == ("near", "slow")
        assert outcomes(first) == ["passed over"]
        assert steps(far) == [2]


def test_a_run_that_came_from_the_far_tier_says_that_its_newest_step_is_only_there():
    with Run() as run:
        run.save(1)
        far = run.far
    with told(), Run(Near(), far, preempt=signal.SIGUSR1) as run:
        run.ckpt.resume(run.state)
        with mock.patch.object(run.near, "create", side_effect=gpuckpt.StorageError("full")):
            signal.raise_signal(signal.SIGUSR1)
            with pytest.raises(gpuckpt.StorageError):
                run.ckpt.step(2, run.state)
        outcome = run.ckpt.preemption
        assert outcome is not None
        assert (outcome.saved, outcome.newest, outcome.tiers) == (False, 1, ("memory",))


# Ctrl-C


def test_an_interrupted_wait_for_a_tier_leaves_the_upload_going_on():
    with Run(Near(), Slow()) as run:
        pending = run.save(1, up=False)
        with interrupted_after(0.05), pytest.raises(KeyboardInterrupt):
            run.ckpt.wait(tier="all")
        run.far.gate.set()
        run.ckpt.wait(tier="all", timeout=30)
        assert outcomes(pending) == ["durable"]


def test_an_interrupted_close_can_be_made_again():
    run = Run(Near(), Slow())
    run.save(1, up=False)
    with interrupted_after(0.05), pytest.raises(KeyboardInterrupt):
        run.ckpt.close()
    with pytest.raises(gpuckpt.LockedError):
        gpuckpt.Checkpointer("", store=run.near)
    run.far.gate.set()
    run.ckpt.close()
    assert whole(run.far) == {1: 1}
    gpuckpt.Checkpointer("", store=run.near).close()


@pytest.mark.parametrize("seconds", [0.0005, 0.002, 0.005, 0.01, 0.02])
def test_ctrl_c_at_any_moment_leaves_both_tiers_whole(seconds):
    near, far = Near(), MemoryStore()
    for round_ in range(3):
        with contextlib.suppress(KeyboardInterrupt), told():
            run = Run(near, far)
            step = max(steps(near), default=0) + 1
            with run, interrupted_after(seconds * (1 + round_ / 3)):
                for at in range(20):
                    run.save(step + at)
    with told(), Run(near, far) as run:
        run.ckpt.wait(tier="all", timeout=30)
        assert max(whole(near), default=0) == max(whole(far), default=0)


# Ends of processes

PROLOGUE = """
    import os, signal, sys, threading, time
    import numpy as np
    import gpuckpt
    from gpuckpt.stores.local import LocalAppender
    from tests.versions import state_at, set_to
    near, far, delay = sys.argv[1], sys.argv[2], float(sys.argv[3])
    append = LocalAppender.append
    def slow(file, parts):
        if far in str(file._path):
            print("reached", flush=True)
            time.sleep(delay)
        append(file, parts)
    LocalAppender.append = slow
    tier = gpuckpt.Tier(far, keep=gpuckpt.Keep(last=1), linger=20)
    ckpt = gpuckpt.Checkpointer(near, tiers=[tier], keep=gpuckpt.Keep(last=1))
    state = state_at(0)
    def save(step):
        set_to(state, step)
        return ckpt.save(step, state)
"""


def run(roots: tuple[Path, Path], program: str, delay: float = 0.3) -> tuple[int, str]:
    text = textwrap.dedent(PROLOGUE) + textwrap.dedent(program)
    command = [sys.executable, "-X", "faulthandler", "-c", text, *map(str, roots), str(delay)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stderr


def found(root: Path) -> dict[int, int]:
    store = LocalStore(root)
    every = steps(store)
    for step in every:
        assert verify_step(store, step, Resources("32 MiB")) == []
    return {step: version_of(gpuckpt.load(root, step)) for step in every}


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "near", tmp_path / "far"


EXITS = {
    "the end": ("", 0),
    "an exception": ("raise ValueError", 1),
    "Ctrl-C": ("signal.raise_signal(signal.SIGINT)", -2),
    "a block": ("ckpt.__exit__(None, None, None)", 0),
}


@pytest.mark.parametrize("end", EXITS)
def test_an_exit_waits_for_what_goes_up(roots, end):
    statement, code = EXITS[end]
    assert run(roots, f"\nsave(1).result()\n{statement}\n")[0] == code
    assert found(roots[1]) == {1: 1}


def test_an_exit_waits_no_longer_than_the_tier_lingers_and_says_what_is_not_up(roots):
    code, said = run(
        roots,
        """
        import gpuckpt.uploader
        gpuckpt.uploader.WIND_DOWN_SECONDS = 0.1
        object.__setattr__(tier, "linger", 0.2)
        save(1).result()
        """,
        delay=60.0,
    )
    assert code == 0
    assert "lacks steps [1]" in said
    assert found(roots[0]) == {1: 1}
    with gpuckpt.Checkpointer(roots[0], tiers=[roots[1]]) as ckpt:
        ckpt.wait(tier="all", timeout=30)
    assert found(roots[1]) == {1: 1}


def test_a_child_that_is_forked_while_a_step_goes_up_is_not_concerned(roots):
    code, said = run(
        roots,
        """
        pending = save(1)
        pending.result()
        time.sleep(0.1)
        if (child := os.fork()) == 0:
            assert not pending.tiers[1].ended.is_set()
            for call in (lambda: ckpt.wait(tier="all"), lambda: pending.tiers[1].ended.wait()):
                try:
                    call()
                except gpuckpt.ClosedError:
                    continue
                os._exit(9)
            ckpt.close()
            sys.exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        ckpt.wait(tier="all", timeout=30)
        save(2)
        ckpt.close()
        """,
    )
    assert code == 0, said
    assert found(roots[1]) == {2: 2}


def test_a_kill_at_any_moment_leaves_the_last_that_came_up_and_the_next_run_brings_up_the_newest(
    roots,
):
    """Eight processes, each killed while it saves and a step goes up."""
    program = textwrap.dedent(PROLOGUE) + textwrap.dedent("""
        target = state_at(0)
        step = ckpt.resume(state)
        while True:
            step += 1
            pending = save(step)
            pending.result()
            pending.tiers[1].ended.wait()
            if pending.tiers[1].outcome == "durable":
                print("up", step, flush=True)
    """)
    rng, last = random.Random(7), 0
    for moment in (2, 3, 4, 5, 6, 8, 11, 14):
        command = [sys.executable, "-c", program, *map(str, roots), "0.002"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            said = []
            for line in process.stdout:  # each write to the far tier is a line, and each step there
                said.append(line)
                if len(said) == moment:
                    time.sleep(rng.random() * 0.01)
                    process.kill()
        assert len(said) >= moment
        up_now = [int(one.split()[1]) for one in said if one.startswith("up ") and "\n" in one]
        last = max([last, *up_now])
        up = found(roots[1])
        assert max(up, default=0) >= last
        assert all(step == version for step, version in up.items())
    with gpuckpt.Checkpointer(roots[0], tiers=[Tier(roots[1], keep=KEEP)]) as ckpt:
        ckpt.wait(tier="all", timeout=30)
        assert ckpt.steps()[-1:] == [max(found(roots[1]))]
    assert last > 0


def test_a_kill_before_any_operation_on_the_far_tier_leaves_it_whole_for_the_next_run():
    def live(life: Life, near: MemoryStore, kill: int | None = None) -> None:
        done = iter(range(10**6))
        with uploading(life, near, Keep(last=1)) as run:
            run.save(1)
            if kill is not None:
                life.store.kills = lambda _: next(done) == kill
            with contextlib.suppress(gpuckpt.CheckpointError):
                run.save(2)
                run.save(3)

    whole_life = Life(CrashStore())
    with whole_life.alive():
        live(whole_life, MemoryStore())
    count = len(whole_life.store.record)
    assert count > 20
    for kill in range(count):
        life, near = Life(CrashStore()), MemoryStore()
        with life.alive():
            live(life, near, kill)
        life.store.revive()
        far: Any = CrashStore(life.store.image())
        promised = dict(life.said)
        there = {one: version_of(gpuckpt.load("", one, store=far)) for one in steps(far)}
        assert promised.items() <= there.items()
        with Run(near, far, tier={"keep": KEEP}) as run:
            run.ckpt.wait(tier="all", timeout=30)
            assert whole(far) == {3: 3} or max(steps(near)) == max(whole(far))


def test_a_machine_that_is_lost_costs_no_more_than_what_was_not_up(roots):
    with gpuckpt.Checkpointer(roots[0], tiers=[roots[1]]) as ckpt:
        pass
    assert run(roots, "\nfor step in (1, 2, 3):\n    save(step).result()\n", delay=0.0)[0] == 0
    for path in roots[0].iterdir():
        path.unlink()
    from tests.versions import state_at

    state = state_at(0)
    with gpuckpt.Checkpointer(roots[0], tiers=[roots[1]]) as ckpt:
        assert ckpt.resume(state) == 3
        assert version_of(state) == 3


def test_damage_near_and_a_kill_far_leave_what_can_be_had(roots):
    near, far = MemoryStore(), MemoryStore()
    with Run(near, far, keep=None, full_every=1) as run:
        run.save(1)
        run.save(2)
    damage(near, 2)
    del far.files["step-000000000002.manifest.json"]
    with told(), Run(near, far, keep=None, on_error="warn") as run:
        run.ckpt.wait(tier="all", timeout=30)
        assert run.ckpt.resume(run.state, fallback=True) == 1
        run.save(3)
        assert set(whole(far)) == {1, 3}
