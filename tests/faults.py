"""Exceptions at every call of the engine in its threads, one at a time.

The n-th call of a function of gpuckpt in a thread of a given name raises, at its entry; then what
is left must be whole: the checkpoint before, the engine, its threads and its memory.

`python -m tests.faults --stride 1` takes every call, `--stride 7` each seventh.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec

import ml_dtypes
import numpy as np

import gpuckpt
from gpuckpt.stores import Store
from gpuckpt.stores.blocks import Blocks
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.memory import MemoryStore
from tests.strategies import same

P = ParamSpec("P")

PACKAGE = str(Path(gpuckpt.__file__).parent)
ERRORS = (MemoryError, RuntimeError, KeyboardInterrupt)
THREADS = ("gpuckpt", "gpuckpt-work-0", "gpuckpt-work-1", "gpuckpt-draw", "gpuckpt-write")
# They allocate nothing and call nothing of Python's: whoever waits relies on them.
SURE = {"Flag.set", "Flag._open"}
CHUNK_NBYTES = 64 << 10
OPTIONS: dict[str, Any] = {"chunk_nbytes": CHUNK_NBYTES, "memory": "8 MiB"}
HANG_SECONDS = 60.0
# Not Python's log: an interrupt can leave a lock of it with the main thread, whatever it logs.
INTERRUPTED = (PACKAGE, str(contextlib.__file__), str(threading.__file__))


class Fault:
    """Counts the engine's calls in threads of one name, and raises in the n-th."""

    def __init__(self, thread: str, at: int | None = None, error: type = RuntimeError) -> None:
        self._name, self._at, self._error = thread, at, error
        self.calls = 0
        self.where: str | None = None

    def trace(self, frame: FrameType, event: str, _: Any) -> None:
        """For `threading.settrace`: looks at calls, follows no lines."""
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        if threading.current_thread().name != self._name or code.co_qualname in SURE:
            return
        self.calls += 1
        if self.calls == self._at:
            self.where = f"{Path(code.co_filename).stem}.{code.co_qualname}"
            raise self._error(f"call {self._at} in {self._name}: {self.where}")

    @contextmanager
    def planted(self) -> Iterator[Fault]:
        """It strikes in threads that are started inside."""
        threading.settrace(self.trace)
        try:
            yield self
        finally:
            threading.settrace(None)


class Interrupt:
    """Counts the main thread's lines in the engine, and raises Ctrl-C's error at the n-th."""

    def __init__(self, at: int | None = None) -> None:
        self._at = at
        self.lines = 0
        self.where: str | None = None

    @contextmanager
    def planted(self) -> Iterator[Interrupt]:
        """It strikes inside."""
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            yield self
        finally:
            sys.settrace(before)

    def _trace(self, frame: FrameType, _: str, __: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(INTERRUPTED) else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self._at:
                self.where = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
                raise KeyboardInterrupt(self.where)
        return self._line


class Run:
    """A checkpointer with a state that is told apart at each step, and what was committed."""

    def __init__(self, root: Path, store: Store | None = None, **options: Any) -> None:
        self.store = store or LocalStore(root, blocks=Blocks(64 << 10, 2, 64 << 10))
        self.ckpt = gpuckpt.Checkpointer(root, store=self.store, **{**OPTIONS, **options})
        self.arrays = np.zeros(90_000, np.float32), np.zeros(5_000, np.int64)
        self.step, self.committed = 0, dict[int, Any]()

    def state(self) -> dict[str, Any]:
        """A master, its copy, and others; a part of it stays the same from step to step."""
        weights, counts = self.arrays
        copy = weights.astype(ml_dtypes.bfloat16)
        return {"w": weights, "copy": copy, "n": [counts, counts[::2]], "step": self.step}

    def advance(self) -> dict[str, Any]:
        self.step += 1
        rng = np.random.default_rng(self.step)
        self.arrays[0][:60_000] += rng.standard_normal(60_000).astype(np.float32)
        self.arrays[1][self.step] = self.step
        return self.state()

    def save(self) -> None:
        """Save the next step, and wait for it; raises what kept it from being saved."""
        state = self.advance()
        before = taken(state)
        try:
            pending = self.ckpt.save(self.step, state)
            pending.result(HANG_SECONDS)
        finally:
            self.settle(before)

    def settle(self, before: Any) -> None:
        """Wait for a save of `before`, which may have failed, and may have been committed."""
        with suppress(gpuckpt.CheckpointError, RuntimeError, MemoryError, KeyboardInterrupt):
            self.ckpt.wait()
        if self.step in self.ckpt.steps():
            self.committed[self.step] = before

    def check(self) -> None:
        """Every committed step is what it was, and nothing is left behind."""
        assert self.ckpt.steps() == sorted(self.committed)
        for step, state in self.committed.items():
            found = gpuckpt.load(self.store.root, step, store=self.store)
            assert same(found, state), f"step {step}"
        assert leftovers() == []

    def close(self) -> None:
        self.ckpt.close(HANG_SECONDS)
        gpuckpt.Checkpointer(self.store.root, store=self.store).close()


def taken(state: Any) -> Any:
    """A copy of a state that shares nothing with it."""
    if isinstance(state, np.ndarray):
        return state.copy()
    if isinstance(state, dict):
        return {key: taken(value) for key, value in state.items()}
    return [taken(value) for value in state] if isinstance(state, list) else state


def leftovers() -> list[str]:
    """The engine's threads that are still there; those that were told to end may take a moment."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        names = [t.name for t in threading.enumerate() if t.name.startswith("gpuckpt")]
        if not names:
            return []
        time.sleep(0.001)
    return names


def save_with(fault: Fault, root: Path, **options: Any) -> str:
    """Two saves, the second with a fault; then another one.  How the second went."""
    run, outcome = Run(root, **options), "saved"
    with ExitStack() as ends:
        ends.callback(run.close)
        run.save()
        with fault.planted():
            try:
                run.save()
            except (*ERRORS, gpuckpt.CheckpointError) as error:
                outcome = type(error).__name__
        run.check()
        run.save()
        run.check()
        assert not slots_lost(run)
    return outcome


def restore_with(fault: Fault, root: Path, **options: Any) -> str:
    """A restore with a fault, and then one without."""
    run, outcome = Run(root, **options), "restored"
    with ExitStack() as ends:
        ends.callback(run.close)
        run.save()
        saved = run.committed[1]
        with fault.planted():
            try:
                run.ckpt.restore(run.state())
                assert same(run.arrays[0], saved["w"])
            except (*ERRORS, gpuckpt.CheckpointError) as error:
                outcome = type(error).__name__
        assert leftovers() == []
        for array in run.arrays:
            array[:] = 7
        target = run.state()
        run.ckpt.restore(target)
        assert same(target, saved)
        run.check()
    return outcome


def alone(play: Callable[P, bool]) -> Callable[P, bool]:
    """Play it in a thread of its own.

    CPython 3.11 doesn't forget what was being handled where a trace function raised: whatever that
    thread raises later would say that it came of it.
    """

    @functools.wraps(play)
    def wrapped(*arguments: P.args, **options: P.kwargs) -> bool:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(play, *arguments, **options).result()

    return wrapped


@alone
def interrupt_in(call: str, interrupt: Interrupt, root: Path, **options: Any) -> bool:
    """A call of the checkpointer that is interrupted, and what must still go after it.

    The state is changed as soon as the interrupt is raised.  Whether it was.
    """
    run, raised = Run(root, MemoryStore(), every=gpuckpt.Every(steps=1), **options), False
    with ExitStack() as ends:
        ends.callback(run.close)
        if call == "update":
            with run.ckpt.update():
                pass
        run.save()
        state = run.advance()
        before = taken(state)
        if call in ("update", "wait", "close", "result"):
            pending = run.ckpt.save(run.step, state)
        calls: dict[str, Callable[[], object]] = {
            "save": lambda: run.ckpt.save(run.step, state),
            "step": lambda: run.ckpt.step(run.step, state),
            "update": lambda: _updated(run),
            "wait": run.ckpt.wait,
            "result": lambda: pending.result(HANG_SECONDS),
            "close": run.ckpt.close,
            "restore": lambda: run.ckpt.restore(state),
            "resume": lambda: run.ckpt.resume(state),
        }
        try:
            with interrupt.planted():
                calls[call]()
        except KeyboardInterrupt:
            raised = True
        if call not in ("update", "wait", "result", "close"):  # these leave it to `update`
            run.arrays[0][:] = -1
        if call == "close":
            run.ckpt.close()
            run.ckpt = gpuckpt.Checkpointer(root, store=run.store, **{**OPTIONS, **options})
        run.settle(before)
        if call in ("restore", "resume"):
            run.committed.pop(run.step, None)
        run.check()
        run.save()
        run.check()
        assert not slots_lost(run)
    return raised


def _updated(run: Run) -> None:
    with run.ckpt.update():
        run.arrays[0][:] = -1


@alone
def begin_interrupted(interrupt: Interrupt, root: Path) -> bool:
    """A checkpointer whose making is interrupted; the lock must be free at once."""
    kept: list[gpuckpt.Checkpointer] = []
    raised = False
    try:
        with interrupt.planted():
            kept.append(gpuckpt.Checkpointer(root))
    except KeyboardInterrupt:
        raised = True
        if not kept:
            gpuckpt.Checkpointer(root).close()
    for one in kept:
        one.close()
    gpuckpt.Checkpointer(root).close()
    return raised


def slots_lost(run: Run) -> bool:
    arena = run.ckpt._saves._resources._arena
    return arena is not None and arena.lacks_slots


SCENARIOS: dict[str, tuple[Callable[..., str], dict[str, Any]]] = {
    "save auto copy": (save_with, {"snapshot": "copy"}),
    "save delta hold": (save_with, {"codec": "delta", "snapshot": "hold"}),
    "save zstd hold": (save_with, {"codec": "zstd", "snapshot": "hold", "full_every": 1}),
    "restore": (restore_with, {"codec": "delta"}),
}


def calls_of(scenario: str, thread: str, root: Path) -> int:
    """How many calls there are to strike at, about."""
    play, options = SCENARIOS[scenario]
    fault = Fault(thread)
    play(fault, root, **options)
    return fault.calls


def strike(scenario: str, thread: str, at: int, root: Path) -> tuple[str, str | None]:
    """Play a scenario with one fault; how it went, and where it struck."""
    play, options = SCENARIOS[scenario]
    fault = Fault(thread, at, ERRORS[at % len(ERRORS)])
    return play(fault, root, **options), fault.where


CALLS = [
    *((call, "copy") for call in ("save", "step", "wait", "result", "close", "restore", "resume")),
    *((call, "hold") for call in ("save", "update", "restore")),
]


def interrupts(stride: int) -> None:
    """Ctrl-C at every line of the main thread, or each so many-th, of every call."""
    for call, snapshot in CALLS:
        with tempfile.TemporaryDirectory() as folder:
            whole = Interrupt()
            interrupt_in(call, whole, Path(folder), snapshot=snapshot)
            outcomes = Counter[str]()
            for at in range(1, whole.lines + 1, stride):
                faulthandler.dump_traceback_later(2 * HANG_SECONDS, exit=True)
                interrupt = Interrupt(at)
                raised = interrupt_in(call, interrupt, Path(folder), snapshot=snapshot)
                outcomes["raised" if raised else "lost" if interrupt.where else "no strike"] += 1
        print(f"Ctrl-C in {call}, {snapshot}: {whole.lines} lines, {dict(outcomes)}", flush=True)


def main() -> None:
    """Every call, or each so many-th, of every scenario in every thread."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stride", type=int, default=1)
    stride = parser.parse_args().stride
    threading.excepthook = lambda _: None
    sys.unraisablehook = lambda _: None
    interrupts(stride)
    for scenario in SCENARIOS:
        for thread in THREADS:
            with tempfile.TemporaryDirectory() as folder:
                count = calls_of(scenario, thread, Path(folder))
            outcomes = Counter[str]()
            for at in range(1, count + 1, stride):
                faulthandler.dump_traceback_later(2 * HANG_SECONDS, exit=True)
                with tempfile.TemporaryDirectory() as folder:
                    outcome, where = strike(scenario, thread, at, Path(folder))
                outcomes[outcome if where else "no strike"] += 1
            print(f"{scenario}, {thread}: {count} calls, {dict(outcomes)}", flush=True)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
