"""Restores in place onto the device, beside what disk and bus would need for the bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cupy

import gpuckpt
from bench.disk import drop_cache
from bench.gpu.contents import state_nbytes, state_of
from bench.gpu.limits import Limits
from bench.gpu.scale import Scale
from bench.timing import spread


def restore_rows(directory: Path, scale: Scale, best: Limits) -> Iterator[dict[str, Any]]:
    """Each size in few and in many tensors, cold and warm."""
    for at, nbytes in enumerate(scale.states_nbytes):
        for tensors in (scale.few, scale.many):
            root = directory / f"restore-{at}-{tensors}"
            yield from restores(root, scale, best, state_of(nbytes, tensors))


def restores(
    root: Path, scale: Scale, best: Limits, state: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """`limit_s`: the bytes' way from the disk or over the bus, whichever takes longer."""
    target = {name: cupy.zeros_like(tensor) for name, tensor in state.items()}
    saved = gpuckpt.save(root, state)
    nbytes = state_nbytes(state)
    with gpuckpt.Checkpointer(root, memory=scale.memory_nbytes) as ckpt:
        ckpt.restore(target)
        assert all(bool((target[name] == one).all()) for name, one in state.items())
        for cache, disk in (("cold", best.read_cold), ("warm", best.read_warm)):
            limit = max(saved.encoded_nbytes / disk, nbytes / best.to_device)
            took = list(_rounds(ckpt, target, root, cache, scale.rounds_of(nbytes)))
            yield {
                "case": "restore",
                "cache": cache,
                "tensors": len(state),
                "state_nbytes": nbytes,
                "encoded_nbytes": saved.encoded_nbytes,
                "restore_s": spread(took),
                "limit_s": limit,
                "share_of_limit": spread(limit / seconds for seconds in took),
            }


def _rounds(
    ckpt: gpuckpt.Checkpointer, target: dict[str, Any], root: Path, cache: str, rounds: int
) -> Iterator[float]:
    for _ in range(rounds):
        if cache == "cold":
            drop_cache(root)
        cupy.cuda.Device().synchronize()
        begun = time.perf_counter()
        ckpt.restore(target)
        cupy.cuda.get_current_stream().synchronize()
        yield time.perf_counter() - begun
