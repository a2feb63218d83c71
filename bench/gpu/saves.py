"""Saves of a state on the device: what the caller, its stream and its steps pay, and what for."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cupy

import gpuckpt
from bench.device import seconds_between
from bench.gpu.contents import state_nbytes, state_of
from bench.gpu.limits import Limits
from bench.gpu.scale import Scale
from bench.gpu.training import Training, touch
from bench.timing import spread, spreads

MODES = ("copy", "hold")
CODECS = ("auto", "raw")


def save_rows(
    directory: Path, scale: Scale, best: Limits, training: Training
) -> Iterator[dict[str, Any]]:
    """Each size, in few and in many tensors, in each mode; the codecs where tensors are few.

    What is held has host memory for all of the state, and once for some slots alone.
    """
    for at, nbytes in enumerate(scale.states_nbytes):
        for tensors in (scale.few, scale.many):
            state = state_of(nbytes, tensors)
            codecs = CODECS if tensors == scale.few else CODECS[:1]
            ways = [
                (mode, codec, nbytes + scale.memory_nbytes) for mode in MODES for codec in codecs
            ]
            ways += [("hold", codec, scale.slots_nbytes) for codec in codecs[1:]]
            for way, (mode, codec, memory) in enumerate(ways):
                root = directory / f"save-{at}-{tensors}-{way}"
                given = {"snapshot": mode, "codec": codec, "memory": memory}
                yield save_row(root, scale, best, training, state, given=given)
            del state


def save_row(
    root: Path,
    scale: Scale,
    best: Limits,
    training: Training,
    state: dict[str, Any],
    *,
    given: dict[str, Any],
) -> dict[str, Any]:
    """The first save apart; the later ones each with a step's work already on the stream.

    `stall_s` and `update_s` are by the caller's clock, `stream_stall_s` and
    `stream_update_s` by events around `save` and `update` on its stream.
    `lost_s` is what all steps beside one save took more than the same number
    without.
    """
    nbytes = state_nbytes(state)
    # All of it each time, also what no step has changed.
    options = {**given, "keep": gpuckpt.Keep(last=1), "full_every": 1}
    with gpuckpt.Checkpointer(root, **options) as ckpt:
        steps = itertools.count(1)
        first = _round(ckpt, state, training, next(steps))
        rounds = [
            _round(ckpt, state, training, next(steps))
            for _ in range(scale.warm_ups + scale.rounds_of(nbytes))
        ][scale.warm_ups :]
        beside = [
            _beside(ckpt, state, training, step, scale) for step in itertools.islice(steps, 3)
        ]
        on_disk = ckpt.latest()
    assert on_disk is not None
    copied = 2 * nbytes / best.copy
    return {
        "case": "save",
        "mode": given["snapshot"],
        "codec": given["codec"],
        "memory_nbytes": given["memory"],
        "tensors": len(state),
        "state_nbytes": nbytes,
        "step": "matrix products" if training.products else "passes over memory",
        "encoded_over_raw": on_disk.encoded_nbytes / on_disk.raw_nbytes,
        "first_stall_s": first["stall_s"],
        **spreads(rounds),
        "stream_stall_over_copy": spread(row["stream_stall_s"] / copied for row in rounds),
        "staged_share_of_to_host": spread(
            nbytes / row["staged_s"] / best.to_host for row in rounds
        ),
        **spreads(beside),
    }


def _round(
    ckpt: gpuckpt.Checkpointer, state: dict[str, Any], training: Training, step: int
) -> dict[str, float]:
    """One save, once the one before has also deleted what it replaces, and the update after it."""
    ckpt.steps()
    with ckpt.update():
        touch(state)
    cupy.cuda.get_current_stream().synchronize()
    training.step()  # the device is busy while the host prepares
    events = [cupy.cuda.Event() for _ in range(3)]
    events[0].record()
    begun = time.perf_counter()
    pending = ckpt.save(step, state)
    stall = time.perf_counter() - begun
    events[1].record()
    begun = time.perf_counter()
    with ckpt.update():
        update = time.perf_counter() - begun
        touch(state)
    events[2].record()
    pending.result()
    events[2].synchronize()
    return {
        "stall_s": stall,
        "stream_stall_s": seconds_between(events[0], events[1]),
        "update_s": update,
        "stream_update_s": seconds_between(events[1], events[2]),
        "staged_s": pending.stats.staged_seconds,
        "background_s": pending.stats.background_seconds,
        "cpu_s": pending.stats.cpu_seconds,
    }


def _beside(
    ckpt: gpuckpt.Checkpointer, state: dict[str, Any], training: Training, step: int, scale: Scale
) -> dict[str, float]:
    """Steps without a save, then steps while one is in flight."""
    alone = spread(training.timed() for _ in range(scale.steps))["median"]
    with ckpt.update():
        touch(state)
    pending = ckpt.save(step, state)
    beside = [training.timed()]
    while not pending.committed.is_set():
        beside.append(training.timed())
    pending.result()
    return {
        "step_alone_s": alone,
        "step_beside_s": spread(beside)["median"],
        "step_beside_over_alone": spread(beside)["median"] / alone,
        "steps_beside": len(beside),
        "lost_s": sum(beside) - alone * len(beside),
    }
