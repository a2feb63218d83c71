"""Ctrl-C and threads that can't be had: nothing is torn, lost or left hanging."""

from __future__ import annotations

import contextlib
import gc
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import gpuckpt
from gpuckpt.arena import AREAS, FEWEST_SLOTS
from gpuckpt.errors import RankError
from gpuckpt.groups.meeting import Meeting
from gpuckpt.groups.threads import MemoryBoard
from gpuckpt.plan import area_nbytes
from gpuckpt.stores.memory import MemoryStore
from tests.faults import CALLS, Interrupt, begin_interrupted, interrupt_in
from tests.often import some
from tests.test_checkpointer import SlowStore


@contextlib.contextmanager
def interrupted_after(
    seconds: float, *more: float, once: threading.Event | None = None
) -> Iterator[None]:
    """Ctrl-C strikes the main thread after these times (`once` that is set), as a signal does.

    Garbage isn't collected meanwhile: Python drops what is raised in a callback of the collector,
    and test tools have such callbacks.
    """
    moments = iter(more)

    def strike(*_: object) -> None:
        following = next(moments, None)
        if following is not None:
            signal.setitimer(signal.ITIMER_REAL, following)
        raise KeyboardInterrupt

    gc.collect()
    gc.disable()
    before = signal.signal(signal.SIGALRM, strike)
    if once is None:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    else:
        main = threading.get_ident()
        after(once, seconds, lambda: signal.pthread_kill(main, signal.SIGALRM))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.enable()


def after(event: threading.Event, seconds: float, do: Callable[[], object]) -> None:
    """Do something so long after an event, in a thread of its own."""

    def run() -> None:
        if event.wait(30):
            time.sleep(seconds)
            do()

    threading.Thread(target=run, daemon=True).start()


def own_threads() -> list[str]:
    """Those that work on chunks; they are joined, and so gone, before a call returns."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("gpuckpt-")]


def wait_interrupted(ckpt: gpuckpt.Checkpointer) -> None:
    with interrupted_after(0.05), pytest.raises(KeyboardInterrupt):
        ckpt.wait()


@pytest.mark.parametrize("snapshot", ["copy", "hold"])
def test_an_interrupted_wait_leaves_the_save_whole_and_the_next_one_waits_for_it(
    tmp_path, snapshot
):
    store, state = SlowStore(), {"w": np.ones(10**6)}
    with gpuckpt.Checkpointer(tmp_path, store=store, snapshot=snapshot) as ckpt:
        with ckpt.update():
            pass
        ckpt.save(1, state)
        wait_interrupted(ckpt)
        opener = threading.Timer(0.1, store.gate.set)
        opener.start()
        with ckpt.update():
            state["w"][:] = 2
        ckpt.save(2, state).result()
        opener.join()
        for step in (1, 2):
            assert np.unique(gpuckpt.load(tmp_path, step, store=store)["w"]) == [step]


def test_an_interrupted_close_keeps_the_lock_while_the_save_goes_on(tmp_path):
    store = SlowStore()
    ckpt = gpuckpt.Checkpointer(tmp_path, store=store)
    ckpt.save(1, {"w": np.ones(1000)})
    with interrupted_after(0.05), pytest.raises(KeyboardInterrupt):
        ckpt.close()
    with pytest.raises(gpuckpt.LockedError):
        gpuckpt.Checkpointer(tmp_path, store=store)
    store.gate.set()
    ckpt.close()
    with gpuckpt.Checkpointer(tmp_path, store=store) as other:
        assert other.steps() == [1]


def test_an_interrupted_save_is_raised_when_the_save_has_ended(tmp_path):
    store, state = SlowStore(), {"w": np.ones(1000)}
    after(store.reached, 0.2, store.gate.set)
    with interrupted_after(0.05, 0.05, once=store.reached), pytest.raises(KeyboardInterrupt):
        gpuckpt.save(tmp_path, state, 1, store=store)
    state["w"][:] = 2
    assert np.unique(gpuckpt.load(tmp_path, store=store)["w"]) == [1]
    gpuckpt.save(tmp_path, state, 2, store=store)


class SlowReads(MemoryStore):
    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        time.sleep(0.02)
        super().read_into(name, offset, buffer)


def test_an_interrupted_restore_leaves_no_thread_and_no_slot_behind(tmp_path):
    store, state = SlowReads(), {"w": np.arange(10**5)}
    memory = FEWEST_SLOTS * AREAS * area_nbytes(8 << 10)
    options: dict = {"store": store, "chunk_nbytes": 8 << 10, "memory": memory}
    with gpuckpt.Checkpointer(tmp_path, **options) as ckpt:
        ckpt.save(1, state).result()
        for _ in range(5):
            with interrupted_after(0.05), pytest.raises(KeyboardInterrupt):
                ckpt.restore(state)
            assert own_threads() == []
        state["w"][:] = 0
        ckpt.restore(state)
        assert (state["w"] == np.arange(10**5)).all()


@pytest.mark.parametrize(("call", "snapshot"), CALLS)
def test_ctrl_c_at_any_line_is_raised_and_leaves_everything_whole(tmp_path, call, snapshot):
    whole = Interrupt()
    interrupt_in(call, whole, tmp_path, snapshot=snapshot)
    stride = max(whole.lines // 23, 1)
    for at in some(range(1 + len(call) % stride, whole.lines, stride)):
        interrupt = Interrupt(at)
        raised = interrupt_in(call, interrupt, tmp_path, snapshot=snapshot)
        assert raised == (interrupt.where is not None)


def test_ctrl_c_at_any_line_of_its_making_leaves_no_lock_behind(tmp_path):
    whole = Interrupt()
    assert not begin_interrupted(whole, tmp_path)
    for at in range(1, whole.lines, 3):
        interrupt = Interrupt(at)
        raised = begin_interrupted(interrupt, tmp_path)
        assert raised == (interrupt.where is not None)


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_ends_the_wait_for_ranks_that_do_not_come(rank):
    group, store = Meeting(MemoryBoard(), rank, 2), MemoryStore()
    with pytest.raises(KeyboardInterrupt), interrupted_after(0.3):
        gpuckpt.Checkpointer("", store=store, group=group, group_timeout="1 h")
    with store.lock():
        assert store.names() == []
    with pytest.raises(RankError):  # the next wait is one again
        group.barrier(what="after", timeout=0.1)


@pytest.mark.parametrize("name", ["gpuckpt", "gpuckpt-work-0", "gpuckpt-draw"])
def test_a_thread_that_cannot_be_had_fails_that_save_alone(tmp_path, monkeypatch, name):
    start = threading.Thread.start

    def start_but_one(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    state = {"w": np.arange(1000)}
    with gpuckpt.Checkpointer(tmp_path, snapshot="hold") as ckpt:
        monkeypatch.setattr(threading.Thread, "start", start_but_one)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            ckpt.save(1, state).result(30)
        monkeypatch.undo()
        with pytest.raises(RuntimeError, match="can't start new thread"):
            ckpt.wait()
        ckpt.save(2, state).result(30)
        assert ckpt.steps() == [2]
    assert own_threads() == []


def test_the_interpreters_exit_waits_for_a_save_that_nobody_waited_for(tmp_path):
    program = """
        import sys, numpy as np, gpuckpt
        ckpt = gpuckpt.Checkpointer(sys.argv[1])
        ckpt.save(1, {"w": np.random.default_rng(0).standard_normal(20_000_000)})
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert gpuckpt.load(tmp_path)["w"].size == 20_000_000


def test_update_in_a_forked_child_does_not_wait_for_the_parents_save(tmp_path):
    program = """
        import os, sys, numpy as np, gpuckpt
        from tests.test_checkpointer import SlowStore
        store = SlowStore()
        ckpt = gpuckpt.Checkpointer(sys.argv[1], store=store, snapshot="hold")
        with ckpt.update():
            pass
        ckpt.save(1, {"w": np.ones(10)})
        child = os.fork()
        if child == 0:
            with ckpt.update():
                os._exit(0)
        print(os.waitpid(child, 0)[1])
        store.gate.set()
        ckpt.close()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert finished.stdout.strip() == "0", finished.stderr
