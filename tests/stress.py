"""Random histories under random trouble, until the time is up: every checkpoint is compared.

`python -m tests.stress --seconds 60 --seed 1` plays lives of a checkpointer one after the other.
In each of them a state is changed, saved, restored and pruned, with threads that are made to sleep
where they hand over to each other and switched thousands of times a second; calls are interrupted,
threads meet exceptions, the disk fails, and children are forked. Whatever of that happens, a step
that is listed is the state at its save, what was committed stays, and the next save works. If
nothing moves for 100 seconds, the stacks of all threads are printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import gpuckpt
from gpuckpt.stores.blocks import Blocks
from gpuckpt.stores.local import LocalAppender, LocalStore
from tests import like_torch
from tests.faults import ERRORS, HANG_SECONDS, PACKAGE, SURE, THREADS, leftovers
from tests.strategies import same
from tests.test_state_changes import CHUNK_NBYTES, Changes, emptied, taken

MISHAPS = (*ERRORS, gpuckpt.CheckpointError)
WATCHDOG_SECONDS = 100
SWITCHES = (1e-6, 1e-5, 5e-3)


class Disk(LocalStore):
    """A directory whose operations fail by chance."""

    def __init__(self, root: Path, rng: random.Random) -> None:
        super().__init__(root, blocks=Blocks(64 << 10, 2, 64 << 10))
        self.rng, self.share = rng, 0.0

    def fail(self, what: str) -> None:
        if self.rng.random() < self.share:
            error = gpuckpt.StorageError(f"can't {what}: no space left on this test's disk")
            error.errno = errno.ENOSPC
            raise error

    def create(self, name: str) -> LocalAppender:
        self.fail("create")
        made = super().create(name)
        sync = made.sync

        def failing() -> None:
            self.fail("sync")
            sync()

        made.sync = failing  # type: ignore[method-assign]
        return made

    def rename(self, old: str, new: str) -> None:
        self.fail("rename")
        super().rename(old, new)

    def remove(self, name: str) -> None:
        self.fail("remove")
        super().remove(name)

    def sync_names(self) -> None:
        self.fail("sync the names")
        super().sync_names()


class Trouble:
    """Sleeps and an exception in the engine's threads, and an interrupt in the main one."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.sleeps = rng.choice((0.0, 0.0, 0.01, 0.1))
        self.thread = rng.choice(THREADS)
        self.at, self.error = -1, rng.choice(ERRORS)
        self.struck = 0

    def fault(self) -> None:
        """One exception, at a call that may come."""
        self.at = int(self.rng.expovariate(1 / 400)) + 1

    def trace(self, frame: FrameType, event: str, _: Any) -> None:
        """For `threading.settrace`."""
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        if self.sleeps and self.rng.random() < self.sleeps:
            time.sleep(self.rng.random() * 1e-3)
        if self.at < 0 or threading.current_thread().name != self.thread:
            return
        self.at -= code.co_qualname not in SURE
        if self.at == 0:
            self.at = -1
            self.struck += 1
            raise self.error(f"in {self.thread}: {code.co_qualname}")

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """Ctrl-C after some microseconds, wherever the engine is; if it isn't, a moment later."""

        over = False

        def strike(_: int, frame: FrameType | None) -> None:
            if over:
                return
            if frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
                self.struck += 1
                raise KeyboardInterrupt
            signal.setitimer(signal.ITIMER_REAL, 1e-4)

        signal.signal(signal.SIGALRM, strike)
        signal.setitimer(signal.ITIMER_REAL, self.rng.expovariate(1 / 2e-3) + 1e-6)
        try:
            yield
        finally:
            over = True
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_IGN)


class Life:
    """One checkpointer after the other on one root."""

    def __init__(self, folder: Path, seed: int, counts: Counter[str]) -> None:
        self.rng, self.counts = random.Random(seed), counts
        self.folder, self.root = folder, folder / "root"
        self.changes = Changes(folder)
        self.store = Disk(self.root, random.Random(seed + 1))
        self.step, self.expected, self.durable = 0, dict[int, Any](), set[int]()
        self.trouble = Trouble(self.rng)
        self.announces = self.rng.random() < 0.5
        self.options: dict[str, Any] = {
            "codec": self.rng.choice(("auto", "delta", "zstd", "raw")),
            "snapshot": self.rng.choice(("copy", "hold", "auto")),
            "full_every": self.rng.choice((1, 3, 8)),
            "keep": self.rng.choice((None, gpuckpt.Keep(last=2))),
            "chunk_nbytes": CHUNK_NBYTES,
            "memory": "8 MiB",
        }
        self.ckpt = self.open()

    def open(self) -> gpuckpt.Checkpointer:
        try:
            return gpuckpt.Checkpointer(self.root, store=self.store, **self.options)
        except gpuckpt.StorageError as error:  # the lock must be free again
            self.mishap(error)
            self.store.share = 0.0
            return gpuckpt.Checkpointer(self.root, store=self.store, **self.options)

    def live(self) -> None:
        """Some actions, and then a look at everything."""
        threading.settrace(self.trouble.trace)
        try:
            for _ in range(self.rng.randrange(5, 40)):
                faulthandler.dump_traceback_later(WATCHDOG_SECONDS, exit=True)
                sys.setswitchinterval(self.rng.choice(SWITCHES))
                self.act()
        finally:
            threading.settrace(None)
            sys.setswitchinterval(0.005)
        self.store.share = 0.0
        self.settle()
        self.check()
        self.save()
        self.check()
        self.ckpt.close(HANG_SECONDS)
        assert leftovers() == []

    def act(self) -> None:
        actions: tuple[tuple[int, Callable[[], None]], ...] = (
            *((6, self.change), (6, self.save), (3, self.save_in_trouble), (2, self.interrupt)),
            *((1, self.restore), (1, self.reopen), (1, self.fork), (1, self.check)),
            *((1, self.flaky), (1, self.close_soon)),
        )
        weights, calls = zip(*actions, strict=True)
        (action,) = self.rng.choices(calls, weights)
        self.counts[action.__name__] += 1
        action()

    def change(self) -> None:
        with self.ckpt.update() if self.announces else nullcontext():
            for _ in range(self.rng.randrange(1, 4)):
                self.changes.change(self.rng.randrange(2**30))

    def save(self) -> None:
        """Whether it may fail or not is said by `flaky`."""
        self.step += 1
        self.expected[self.step] = taken(self.changes.state)
        try:
            pending = self.ckpt.save(self.step, self.changes.state)
            if self.rng.random() < 0.5:
                pending.result(HANG_SECONDS)
                self.durable.add(self.step)
        except MISHAPS as error:
            self.mishap(error)

    def mishap(self, error: BaseException) -> None:
        if isinstance(error, gpuckpt.BusyError):
            raise error
        self.counts[f"raised {type(error).__name__}"] += 1

    def save_in_trouble(self) -> None:
        self.trouble.fault()
        self.save()
        self.settle()
        self.trouble.at = -1

    def interrupt(self) -> None:
        """Ctrl-C in one call or another."""
        self.step += 1
        self.expected[self.step] = taken(self.changes.state)
        calls: tuple[Callable[[], object], ...] = (
            lambda: self.ckpt.save(self.step, self.changes.state),
            self.ckpt.wait,
            self.ckpt.close,
            lambda: self.ckpt.restore(emptied(taken(self.changes.state)), strict=False),
        )
        call = self.rng.choice(calls)
        try:
            with self.trouble.interrupted():
                call()
        except MISHAPS as error:
            self.mishap(error)
        if self.rng.random() < 0.3 or call == self.ckpt.close:
            self.reopen()

    def restore(self) -> None:
        self.settle()
        steps = self.ckpt.steps()
        if steps:
            step = self.rng.choice(steps)
            target = emptied(self.expected[step])
            self.ckpt.restore(target, step)
            assert same(target, self.expected[step]), f"step {step} restored"

    def reopen(self) -> None:
        self.close()
        self.ckpt = self.open()

    def close(self) -> None:
        with suppress(*MISHAPS):
            self.ckpt.close(HANG_SECONDS)
        self.ckpt.close(HANG_SECONDS)

    def close_soon(self) -> None:
        """With hardly any time for it."""
        with suppress(*MISHAPS):
            self.ckpt.close(self.rng.random() * 1e-3)
        self.reopen()

    def flaky(self) -> None:
        """The disk begins, or ceases, to fail."""
        self.store.share = 0.0 if self.store.share else self.rng.choice((0.02, 0.2))

    def fork(self) -> None:
        """A child that looks at the root, saves elsewhere, and ends one way or another."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            self.in_child()
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0

    def in_child(self) -> None:
        code = 1
        try:
            # The thread that watches isn't here, and whoever asked for another would wait for it.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(WATCHDOG_SECONDS // 2)
            threading.settrace(None)
            self.ckpt.close()
            with suppress(gpuckpt.NotFoundError):
                found = gpuckpt.load(self.root, like="numpy")
                assert any(same(found, state) for state in self.expected.values())
            elsewhere = self.folder / f"child-{os.getpid()}"
            state = self.expected.get(self.step, {})
            with gpuckpt.Checkpointer(elsewhere, snapshot="copy") as own:
                own.save(1, state)
            assert same(gpuckpt.load(elsewhere, like="numpy"), state)
            code = 0
        finally:
            if code:
                faulthandler.dump_traceback()
            os._exit(code)

    def settle(self) -> None:
        """Wait for the save in flight, however it ends."""
        with suppress(*MISHAPS):
            self.ckpt.wait()
        self.ckpt.wait()

    def check(self) -> None:
        """What is listed is what was saved, and what was promised is listed."""
        self.settle()
        steps = self.ckpt.steps()
        for step in steps:
            found = gpuckpt.load(self.root, step, like="numpy", store=self.store)
            assert same(found, self.expected[step]), f"step {step}"
        self.counts["compared"] += len(steps)
        if self.options["keep"] is None:
            assert self.durable <= set(steps)
        elif self.durable:
            assert steps[-1] >= max(self.durable)


def play(seconds: float, seed: int) -> Counter[str]:
    """Lives one after the other, for so long; how often what was done."""
    counts, end = Counter[str](), time.monotonic() + seconds
    sys.modules["torch"], before = like_torch.module(), sys.modules.get("torch")
    logging.getLogger("gpuckpt").setLevel(logging.CRITICAL)
    threading.excepthook, hook = lambda _: None, threading.excepthook
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            while time.monotonic() < end:
                with tempfile.TemporaryDirectory(prefix="stress-") as folder:
                    one = Life(Path(folder), seed, counts)
                    try:
                        one.live()
                    except BaseException:
                        print(f"seed {seed}, {one.options}, announces {one.announces}")
                        raise
                    counts["troubles"] += one.trouble.struck
                counts["lives"] += 1
                seed += 1
    finally:
        faulthandler.cancel_dump_traceback_later()
        threading.excepthook = hook
        logging.getLogger("gpuckpt").setLevel(logging.NOTSET)
        del sys.modules["torch"]
        if before is not None:
            sys.modules["torch"] = before
    return counts


def main() -> None:
    """Play, and say what was done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.unraisablehook = lambda _: None
    counts = play(options.seconds, options.seed)
    print(", ".join(f"{name}: {count}" for name, count in sorted(counts.items())))


if __name__ == "__main__":
    main()
