"""Forks and exits while a save is in flight: nothing hangs, nothing committed is lost."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import gpuckpt

# Enough that a save is in flight for a while.
PROLOGUE = """
    import atexit, multiprocessing, os, signal, sys, threading
    import numpy as np
    import gpuckpt
    root = sys.argv[1]
    first = np.random.default_rng(0).standard_normal(2_000_000)
    state = {"w": first.copy(), "step": 1}
    def advance(step):
        state["w"][:] = first + (step - 1)
        state["step"] = step
    ckpt = gpuckpt.Checkpointer(root, snapshot=sys.argv[2])
    ckpt.save(1, state).result()
    with ckpt.update():
        advance(2)
"""


def run(root: Path, program: str, snapshot: str = "copy") -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, which must end by itself."""
    text = textwrap.dedent(PROLOGUE) + textwrap.dedent(program)
    command = [sys.executable, "-X", "faulthandler", "-c", text, str(root), snapshot]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)


def saved(root: Path) -> list[int]:
    """The steps that are there, each of which is whole; the root is free."""
    with gpuckpt.Checkpointer(root) as ckpt:
        steps = ckpt.steps()
    first = np.random.default_rng(0).standard_normal(2_000_000)
    for step in steps:
        state = gpuckpt.load(root, step)
        assert state["step"] == step
        assert (state["w"] == first + (step - 1)).all()
    return steps


EXITS = {
    "the end": ("", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "an exception": ("raise ValueError", 1),
    "sys.exit in an exit handler": ("atexit.register(sys.exit, 5)", 0),
    "an exit handler that closes": ("atexit.register(ckpt.close)", 0),
    "the end of the checkpointer": ("del ckpt", 0),
    "another thread's error": ("threading.Thread(target=lambda: 1 / 0).start()", 0),
    "a signal": ("signal.signal(15, lambda *_: sys.exit(4)); os.kill(os.getpid(), 15)", 4),
    "Ctrl-C": ("signal.raise_signal(signal.SIGINT)", -2),
}


@pytest.mark.parametrize(
    ("end", "snapshot"),
    [*((end, "copy") for end in EXITS), ("the end", "hold"), ("Ctrl-C", "hold")],
)
def test_an_exit_waits_for_the_save_in_flight(tmp_path, end, snapshot):
    statement, code = EXITS[end]
    finished = run(tmp_path, f"\nckpt.save(2, state)\n{statement}\n", snapshot)
    assert finished.returncode == code, finished.stderr
    assert saved(tmp_path) == [1, 2]


def test_a_process_that_ends_at_once_leaves_what_was_committed(tmp_path):
    finished = run(tmp_path, "\nckpt.save(2, state)\nos._exit(7)\n")
    assert finished.returncode == 7
    assert saved(tmp_path) in ([1], [1, 2])


@pytest.mark.parametrize("daemon", [True, False])
def test_a_save_that_another_thread_began_is_waited_for(tmp_path, daemon):
    program = f"""
    thread = threading.Thread(target=lambda: ckpt.save(2, state), daemon={daemon})
    thread.start()
    thread.join()
    """
    finished = run(tmp_path, program)
    assert finished.returncode == 0, finished.stderr
    assert saved(tmp_path) == [1, 2]


# What a child does, with a save of its parent in flight: its exit code is 0 if all went well.
CHILDREN = {
    "ends": "pass",
    "ends by an exception": "raise ValueError",
    "ends at once": "os._exit(0)",
    "closes": "ckpt.close()",
    "leaves the block": "ckpt.__exit__(None, None, None)",
    "updates": """
        with ckpt.update():
            state["w"][:] = 0
    """,
    "is refused": """
        for call in (lambda: ckpt.save(3, state), lambda: ckpt.step(3, state), ckpt.wait,
                     lambda: ckpt.restore(state), lambda: ckpt.resume(state), ckpt.__enter__):
            try:
                call()
            except gpuckpt.ClosedError as error:
                assert "parent" in str(error)
            else:
                os._exit(9)
    """,
    "waits for the parent's save": """
        for wait in (pending.result, pending.committed.wait, pending.committed.wait_out):
            try:
                wait()
            except gpuckpt.ClosedError as error:
                assert "parent" in str(error)
            else:
                assert pending.committed.is_set()
    """,
    "saves elsewhere": """
        with gpuckpt.Checkpointer(root + "/child", snapshot=sys.argv[2]) as own:
            own.save(1, state).result()
            target = {"w": np.zeros_like(state["w"]), "step": 0}
            own.restore(target)
            assert (target["w"] == state["w"]).all()
        gpuckpt.save(root + "/child", state, 2)
        assert gpuckpt.load(root + "/child", 2)["step"] == 2
    """,
    "lists and loads": """
        assert gpuckpt.load(root, 1)["step"] == 1
    """,
    "is refused the root": """
        try:
            gpuckpt.Checkpointer(root)
        except gpuckpt.LockedError:
            pass
        else:
            os._exit(9)
    """,
    "logs": "import logging; logging.getLogger('gpuckpt').warning('here I am')",
}


@pytest.mark.parametrize(
    ("child", "snapshot"),
    [*((one, "copy") for one in CHILDREN), ("updates", "hold"), ("saves elsewhere", "hold")],
)
def test_a_child_that_is_forked_while_a_save_is_in_flight(tmp_path, child, snapshot):
    program = """
    # A loop that announces its updates, so that `hold` goes on beside it.
    pending = ckpt.save(2, state)
    forked = os.fork()
    if forked == 0:
        CHILD
        sys.exit(0)
    _, status = os.waitpid(forked, 0)
    pending.result()
    with ckpt.update():
        advance(3)
    ckpt.save(3, state)
    ckpt.close()
    sys.exit(os.waitstatus_to_exitcode(status))
    """
    does = textwrap.indent(textwrap.dedent(CHILDREN[child]).strip(), " " * 8).strip()
    finished = run(tmp_path, program.replace("CHILD", does), snapshot)
    assert finished.returncode == (1 if "exception" in child else 0), finished.stderr
    assert saved(tmp_path) == [1, 2, 3]


def test_many_forks_while_saves_go_on_lock_nothing_up(tmp_path):
    """By `multiprocessing`, as loaders of data do; each child saves something itself."""
    program = """
    def work(at):
        gpuckpt.save(f"{root}/{at % 2}-{os.getpid()}", {"at": np.arange(at)}, at)
        return at

    forks = multiprocessing.get_context("fork")
    for step in range(2, 6):
        advance(step)
        ckpt.save(step, state)
        with forks.Pool(2) as pool:
            assert pool.map(work, range(4)) == list(range(4))
    ckpt.close()
    """
    finished = run(tmp_path, program)
    assert finished.returncode == 0, finished.stderr
    assert saved(tmp_path) == [1, 2, 3, 4, 5]
