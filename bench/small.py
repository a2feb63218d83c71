"""The stall of saving thousands of small tensors: what each tensor costs the training loop.

A state as training has it, nested by model and optimizer.  Its bytes are few,
so that what is measured is the work for each tensor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import gpuckpt
from bench.timing import spread, spreads

LAYERS = 1000  # three tensors each
FIRSTS = 3
ROUNDS = 20
STALL_LIMIT_SECONDS = 0.002
_SHAPES = ((32, 16), (16,), (8, 8, 3))

New = Callable[[Any], Any]


def small_state(new: New, layers: int = LAYERS) -> dict[str, Any]:
    """Seeded float32 weights and Adam's two moments of each; `new` makes a tensor of numpy's."""
    rng = np.random.default_rng(7)

    def tensor(at: int) -> Any:
        return new(rng.standard_normal(_SHAPES[at % len(_SHAPES)], np.float32))

    return {
        "model": {f"layers.{at}.weight": tensor(at) for at in range(layers)},
        "optimizer": {
            "state": {
                at: {"exp_avg": tensor(at), "exp_avg_sq": tensor(at)} for at in range(layers)
            },
            "lr": 1e-3,
            "step": 0,
        },
    }


def tensors_of(state: dict[str, Any]) -> list[Any]:
    """Its arrays."""
    moments = (one for both in state["optimizer"]["state"].values() for one in both.values())
    return [*state["model"].values(), *moments]


def small_tensors(
    directory: Path, new: New, library: str, device: str, mode: str, *, layers: int = LAYERS
) -> dict[str, Any]:
    """The stall of `Checkpointer.save`, the first time and later, beside plain Python's least.

    `look_s` is one loop that only asks each tensor for its shape;
    `thread_cpu_s` the calling thread's CPU seconds in `save`, which other
    threads on the same cores don't lengthen.  `device` is what the figures are
    of: the stand-in's are the host's work and nothing else.
    """
    state = small_state(new, layers)
    firsts = [next(_rounds(directory, state, mode)) for _ in range(FIRSTS)]
    rounds = _rounds(directory, state, mode)
    next(rounds)
    later = [next(rounds) for _ in range(ROUNDS)]
    rounds.close()
    tensors = tensors_of(state)
    result = {
        "case": f"small-{library}-{mode}",
        "device": device,
        "mode": mode,
        "tensors": len(tensors),
        "state_nbytes": sum(tensor.nbytes for tensor in tensors),
        "first_stall_s": spread(row["stall_s"] for row in firsts),
        **spreads(later),
        "memcpy_s" if library == "numpy" else "look_s": spread(_least(tensors, library)),
    }
    if library == "cupy":
        result["stated_limit"] = f"stall_s min < {STALL_LIMIT_SECONDS}"
        result["kept"] = result["stall_s"]["min"] < STALL_LIMIT_SECONDS
    return result


def _rounds(
    directory: Path, state: dict[str, Any], mode: str
) -> Generator[dict[str, float], None, None]:
    """Saves of a new checkpointer, each with a step's changes before it and nothing in flight."""
    change = state["model"]["layers.0.weight"]
    with gpuckpt.Checkpointer(directory, keep=gpuckpt.Keep(last=1), snapshot=mode) as ckpt:
        for step in range(1, FIRSTS + ROUNDS):
            with ckpt.update():
                change += 1
                state["optimizer"]["step"] = step
            begun, cpu = time.perf_counter(), time.thread_time()
            pending = ckpt.save(step, state)
            cpu, stall = time.thread_time() - cpu, time.perf_counter() - begun
            begun = time.perf_counter()
            with ckpt.update():
                pass
            update = time.perf_counter() - begun
            pending.result()
            background = pending.stats.background_seconds
            yield {
                "stall_s": stall,
                "thread_cpu_s": cpu,
                "update_s": update,
                "background_s": background,
            }


def _least(tensors: list[Any], library: str) -> Iterator[float]:
    """Seconds of the plainest loop over the tensors: on the host it copies them."""
    warm = [np.ones_like(tensor) for tensor in tensors] if library == "numpy" else []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        if warm:
            for to, tensor in zip(warm, tensors, strict=True):
                np.copyto(to, tensor)
        else:
            for tensor in tensors:
                _ = tensor.shape
        yield time.perf_counter() - begun
