"""Ranks whose storage, and whose place to meet, fail now and then: nothing committed is torn.

    python -m tests.unlucky_ranks --seconds 600 --seed 1

Three ranks, threads of one process, save a dozen steps with time-outs shorter than
some of their operations.  Each put, look and removal of the board, and each
operation of the store, may fail or take long; before the operation or after it.
Whenever rank 0 is told that a step is durable, and at the end, every committed
step must have all its files.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import random
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

import gpuckpt
from gpuckpt.commit import open_step, steps
from gpuckpt.errors import CheckpointError, NotFoundError, StorageError
from gpuckpt.groups import Group
from gpuckpt.groups.meeting import Meeting
from gpuckpt.groups.threads import MemoryBoard
from gpuckpt.stores.memory import MemoryStore
from tests.relay import GathersOnly

RANKS, SAVES = 3, 12
OPENING_SECONDS, TIMEOUT_SECONDS, GRACE_SECONDS, PATIENCE_SECONDS = 20.0, 0.3, 0.05, 60.0
SLOW_SHARE, SLOW_SECONDS = 0.05, (0.01, 0.05, 0.35)


class UnluckyBoard:
    """A board of all ranks' that fails for one of them."""

    for_threads = True

    def __init__(self, board: MemoryBoard, luck: random.Random, share: float) -> None:
        self._board, self._luck, self._share, self.on = board, luck, share, False

    def put(self, key: str, value: bytes) -> None:
        self._fails()
        self._board.put(key, value)
        self._fails()

    def wait(self, key: str, timeout: float) -> bytes | None:
        self._fails()
        return self._board.wait(key, timeout)

    def remove(self, key: str) -> None:
        self._fails()
        self._board.remove(key)

    def sweep(self, run: str, session: str) -> None:
        self._board.sweep(run, session)

    def _fails(self) -> None:
        if self.on and self._luck.random() < self._share:
            raise ConnectionError("no luck") if self._luck.random() < 0.7 else MemoryError


class UnluckyStore(MemoryStore):
    """The files of all ranks, with which one of them has no luck."""

    def __init__(self, store: MemoryStore, luck: random.Random, share: float) -> None:
        super().__init__()
        self.files, self._luck, self._share, self.on = store.files, luck, share, False

    def create(self, name: str) -> Any:
        self._fails()
        return super().create(name)

    def rename(self, old: str, new: str) -> None:
        self._fails()
        super().rename(old, new)
        self._fails()

    def remove(self, name: str) -> None:
        self._fails()
        super().remove(name)

    def names(self) -> list[str]:
        self._fails()
        return super().names()

    def _fails(self) -> None:
        if self.on and self._luck.random() < self._share:
            raise StorageError("no luck")
        if self.on and self._luck.random() < SLOW_SHARE:
            time.sleep(self._luck.choice(SLOW_SECONDS))


class Trial:
    """A run of all ranks; `torn` are the steps that were found without some of their files."""

    def __init__(self, seed: int, share: float, wrap: Callable[[Group], Group]) -> None:
        self._seed, self._share, self._wrap = seed, share, wrap
        self._board, self.store = MemoryBoard(), MemoryStore()
        self._ended = threading.Barrier(RANKS)
        self.torn: list[tuple[int, set[str]]] = []
        self.saves: Counter[bool] = Counter()

    def run(self) -> None:
        """Let all save, and load what is there."""
        threads = [threading.Thread(target=self._live, args=(rank,)) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive(), f"seed {self._seed}: a rank hangs"
        for step in steps(self.store):
            gpuckpt.load("", step, store=self.store)

    def _live(self, rank: int) -> None:
        luck, common = random.Random(self._seed * 10 + rank), random.Random(self._seed)
        board = UnluckyBoard(self._board, luck, self._share)
        store = UnluckyStore(self.store, luck, self._share)
        meeting = Meeting(board, rank, RANKS, grace=GRACE_SECONDS)
        keep = gpuckpt.Keep(last=common.choice([1, 2]))
        ckpt = gpuckpt.Checkpointer(
            *("",),
            store=store,
            group=self._wrap(meeting),
            memory="64 MiB",
            group_timeout=OPENING_SECONDS,
            codec="raw",
            keep=keep,
            on_error="warn",
        )
        assert ckpt._saves._joint is not None
        ckpt._saves._joint._timeout = TIMEOUT_SECONDS
        board.on = store.on = True
        try:
            self._save(ckpt, rank, luck, common)
        finally:
            board.on = store.on = False
            with contextlib.suppress(CheckpointError, ConnectionError, MemoryError):
                ckpt.wait()
            with contextlib.suppress(threading.BrokenBarrierError):
                self._ended.wait(PATIENCE_SECONDS)
            with contextlib.suppress(CheckpointError):
                ckpt.close()
        if rank == 0:
            self._look()

    def _save(
        self, ckpt: gpuckpt.Checkpointer, rank: int, luck: random.Random, common: random.Random
    ) -> None:
        same, step = np.arange(3000, dtype=np.float32), 0
        for at in range(SAVES):
            step += common.choice([0, 1, 1]) if at else 1
            if common.random() < 0.2:
                same = same + 1
            own = gpuckpt.PerRank(np.full(4, rank))
            state = {"w": np.full(3000, at, np.float32), "same": same, "own": own}
            try:
                pending = ckpt.save(step, state)
            except (CheckpointError, ConnectionError, MemoryError):
                self.saves[False] += 1
                continue
            if luck.random() < 0.8 and pending.committed.wait(PATIENCE_SECONDS):
                self.saves[pending.failure is None] += 1
                if rank == 0 and pending.failure is None:
                    self._look()

    def _look(self) -> None:
        """See that every committed step has all its files."""
        for step in steps(self.store):
            with contextlib.suppress(NotFoundError):
                manifest = open_step(self.store, step, parts=False)
                lost = set(manifest.files) - set(self.store.names())
                if lost and step in steps(self.store):
                    self.torn.append((step, lost))


def main() -> None:
    """Try until the time is over; the seeds that tore a step."""
    parser = argparse.ArgumentParser("python -m tests.unlucky_ranks", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.01, help="of operations that fail")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    end, saves, torn = time.monotonic() + options.seconds, Counter[bool](), 0
    for seed in itertools.count(options.seed):
        for wrap in (lambda group: group, GathersOnly):
            trial = Trial(seed, options.share, wrap)
            trial.run()
            saves += trial.saves
            if trial.torn:
                torn += 1
                print(f"seed {seed}, {wrap}: torn: {trial.torn}")
        if time.monotonic() > end:
            break
    count = 2 * (seed - options.seed + 1)
    print(
        f"{count} runs, {torn} torn; {saves[True]} saves that were durable, {saves[False]} failed"
    )


if __name__ == "__main__":
    main()
