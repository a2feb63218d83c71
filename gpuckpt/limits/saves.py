"""What saves cost a loop here: made as a Checkpointer makes them, beside loops of two kinds."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import gpuckpt
from gpuckpt.effort import Effort, Efforts
from gpuckpt.stats import Stats

ROUNDS = 3
TENSORS = 64
CODECS = ("auto", "raw", "zstd")
# Steps before each save, by which those beside it are judged.
_STEPS = 8
_STEP_SECONDS = 0.01
_MATRIX = 384

State = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SaveCost:
    """Medians of some saves of one state: seconds, bytes, and those in memory for each on disk.

    `busy`: beside a loop that takes every core, else one that waits, as for a GPU.
    `interval` is the shortest between saves that keeps their cost under the share
    of the time that was asked for, `encode` the bytes a second of one thread.
    """

    codec: str
    busy: bool
    stall: float
    slower: float
    background: float
    ratio: float
    written_nbytes: int
    interval: float
    encode: float | None


def make_state(nbytes: int, library: Any = np) -> dict[str, Any]:
    """Float32 of a normal distribution, in 64 tensors; `library` is numpy or cupy."""
    count = max(nbytes // TENSORS // 4, 1)
    rng = np.random.default_rng(7)
    return {
        f"w{at}": library.asarray(rng.standard_normal(count, np.float32)) for at in range(TENSORS)
    }


def save_cost(
    directory: Path,
    state: State,
    codec: str,
    *,
    busy: bool,
    overhead: float,
    rounds: int = ROUNDS,
) -> SaveCost:
    """Save a state some times beside a loop; its numbers change before each.

    Blocks for a few seconds, more for a large state.  Removes what it wrote.

    Raises:
        CheckpointError: it couldn't be saved.
    """
    root, work = directory / f"{codec}-{'busy' if busy else 'waiting'}", _work(busy=busy)
    nbytes = sum(one.nbytes for one in state.values())
    found: list[Stats] = []
    never = gpuckpt.Every(steps=10**9)
    keep, memory = gpuckpt.Keep(last=1), nbytes + (1 << 30)
    with gpuckpt.Checkpointer(root, codec=codec, every=never, keep=keep, memory=memory) as ckpt:
        ckpt.resume(state)
        step = _saved(ckpt, state, 1, work, [])  # takes the memory that later saves use
        for _ in range(rounds):
            step = _saved(ckpt, state, step, work, found)
    shutil.rmtree(root)
    return _cost(found, codec, busy=busy, overhead=overhead)


def _saved(
    ckpt: gpuckpt.Checkpointer,
    state: State,
    step: int,
    work: Callable[[], None],
    found: list[Stats],
) -> int:
    """Steps without a save, steps beside one, and one after it; the next step's number."""
    with ckpt.update():
        for one in state.values():
            one *= -1  # noqa: PLW2901 (in place)
    for _ in range(_STEPS):
        step = _step(ckpt, state, step, work)
    pending = ckpt.save(step, state)
    while not pending.committed.is_set():
        step = _step(ckpt, state, step, work)
    ckpt.wait()
    step = _step(ckpt, state, step, work)
    found.append(pending.stats)
    return step


def _step(ckpt: gpuckpt.Checkpointer, state: State, step: int, work: Callable[[], None]) -> int:
    work()
    ckpt.step(step + 1, state)
    return step + 1


def _cost(found: list[Stats], codec: str, *, busy: bool, overhead: float) -> SaveCost:
    efforts = Efforts((Effort(1, codec),), overhead)
    for one in found:
        cost = one.stall_seconds + one.slowdown_seconds
        efforts.ended(Effort(1, codec), cost, one.stall_seconds + one.background_seconds)
    encodes = [one.rates["encode"] for one in found if "encode" in one.rates]
    return SaveCost(
        codec,
        busy,
        stall=statistics.median(one.stall_seconds for one in found),
        slower=statistics.median(one.slowdown_seconds for one in found),
        background=statistics.median(one.background_seconds for one in found),
        ratio=statistics.median(one.ratio for one in found),
        written_nbytes=round(statistics.median(one.written_nbytes for one in found)),
        interval=efforts.interval(Effort(1, codec)),
        encode=statistics.median(encodes) if encodes else None,
    )


def _work(*, busy: bool) -> Callable[[], None]:
    """A step of about ten milliseconds: on all cores, or none."""
    if not busy:
        return lambda: time.sleep(_STEP_SECONDS)
    matrix = np.ones((_MATRIX, _MATRIX), np.float32)
    out = np.empty_like(matrix)
    begun = time.perf_counter()
    for _ in range(5):
        np.matmul(matrix, matrix, out=out)
    times = max(round(5 * _STEP_SECONDS / (time.perf_counter() - begun)), 1)

    def multiply() -> None:
        for _ in range(times):
            np.matmul(matrix, matrix, out=out)

    return multiply
