"""What is measured: the stall of a save, and a whole save and restore, each beside its limit.

The data is seeded and looks like a training state to a coder: normally
distributed float32, whose exponents compress and whose mantissas don't.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import gpuckpt
from bench.disk import fill_cache, write_and_sync
from bench.timing import spread

ROUNDS = 9  # one more is run first and not counted
State = dict[str, npt.NDArray[np.float32]]


def state_of(nbytes: int, tensors: int) -> State:
    """Normally distributed weights of `nbytes` in all."""
    rng = np.random.default_rng(7)
    count = nbytes // tensors // 4
    return {f"w{at}": rng.standard_normal(count, np.float32) for at in range(tensors)}


def stall(directory: Path, nbytes: int, tensors: int) -> dict[str, Any]:
    """The caller's stall in `copy` mode, beside a memcpy of the state into warm memory."""
    state = state_of(nbytes, tensors)
    warm = {name: np.ones_like(array) for name, array in state.items()}
    rounds = list(_stall_rounds(directory, state, warm, nbytes))[1:]
    ratio = spread([row["stall"] / row["memcpy"] for row in rounds])
    return {
        "case": "stall",
        "state_nbytes": nbytes,
        "tensors": tensors,
        "mode": "copy",
        "stall_s": spread([row["stall"] for row in rounds]),
        "memcpy_s": spread([row["memcpy"] for row in rounds]),
        "stall_over_memcpy": ratio,
        "background_s": spread([row["background"] for row in rounds]),
        "stated_limit": "stall_over_memcpy median <= 1.3",
        "kept": ratio["median"] <= 1.3,
    }


def _stall_rounds(
    directory: Path, state: State, warm: State, nbytes: int
) -> Iterator[dict[str, float]]:
    every, keep = gpuckpt.Every(steps=1), gpuckpt.Keep(last=1)
    memory = nbytes + (256 << 20)
    with gpuckpt.Checkpointer(
        directory, every=every, keep=keep, snapshot="copy", memory=memory
    ) as ckpt:
        ckpt.resume(state)
        for step in range(1, ROUNDS + 2):
            with ckpt.update():
                state["w0"][0] = step
            begun = time.perf_counter()
            for name, array in state.items():
                np.copyto(warm[name], array)
            memcpy = time.perf_counter() - begun
            begun = time.perf_counter()
            pending = ckpt.step(step, state)
            blocked = time.perf_counter() - begun
            assert pending is not None
            pending.result()
            background = pending.stats.background_seconds
            yield {"stall": blocked, "memcpy": memcpy, "background": background}


def roundtrip(directory: Path, nbytes: int, tensors: int, codec: str) -> dict[str, Any]:
    """A durable save and a warm restore in place, beside write + fsync of the same bytes."""
    state, rows = state_of(nbytes, tensors), []
    target = {name: np.zeros_like(array) for name, array in state.items()}
    for _ in range(ROUNDS + 1):
        row = {"raw_write": write_and_sync(directory / "plain.bin", state.values())}
        begun = time.perf_counter()
        checkpoint = gpuckpt.save(directory / codec, state, codec=codec)
        row["save"] = time.perf_counter() - begun
        fill_cache(directory / codec)
        with gpuckpt.Checkpointer(directory / codec) as ckpt:
            begun = time.perf_counter()
            ckpt.restore(target)
            row["restore"] = time.perf_counter() - begun
        assert all((target[name] == array).all() for name, array in state.items())
        rows.append(row)
    rows = rows[1:]
    return {
        "case": f"roundtrip-{codec}",
        "state_nbytes": nbytes,
        "tensors": tensors,
        "durable": True,
        "restore_cache": "warm",
        "encoded_over_raw": checkpoint.encoded_nbytes / checkpoint.raw_nbytes,
        "save_s": spread([row["save"] for row in rows]),
        "write_fsync_s": spread([row["raw_write"] for row in rows]),
        "save_over_write_fsync": spread([row["save"] / row["raw_write"] for row in rows]),
        "restore_s": spread([row["restore"] for row in rows]),
    }
