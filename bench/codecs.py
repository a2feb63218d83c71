"""Codecs in turn: when a save is durable, beside `raw` and beside what disk and cores allow.

Every round saves the same state with each codec, in a new order, and writes its
bytes once by a bare loop of direct writes.  Values are those of `bench.cases`.
The cores' limit is the time of one core for one chunk after the other, measured
in the same round, divided by the cores.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

import gpuckpt
from bench.cases import State, state_of
from bench.timing import Spread, spread, spreads
from bench.write import SEED, bare
from gpuckpt.arena import AREAS, Arena, Slot
from gpuckpt.coding import Samples, encode_chosen
from gpuckpt.fingerprint import checksum
from gpuckpt.look import look
from gpuckpt.plan import area_nbytes
from gpuckpt.save import CODECS
from gpuckpt.stores.blocks import aligned_memory

ROUNDS = 5  # one more is run first and not counted
NAMES = ("raw", "auto", "zstd")
_CHUNK_NBYTES = 4 << 20


def codecs(directory: Path, nbytes: int, tensors: int) -> dict[str, Any]:
    """Seconds until durable of each codec, of CPU, of them without the stall, and ratios."""
    state = state_of(nbytes, tensors)
    rows = _rounds(directory, state, nbytes)[1:]
    figures: dict[str, Spread] = spreads(rows)
    for name in ("auto", "zstd"):
        pairs = [row[f"{name}_durable_s"] / row["raw_durable_s"] for row in rows]
        figures[f"{name}_over_raw"] = spread(pairs)
    for name in NAMES:
        pairs = [row[f"{name}_background_s"] / _limit(row, name) for row in rows]
        figures[f"{name}_background_over_limit"] = spread(pairs)
    middle = figures["auto_over_raw"]["median"]
    limit = {"stated_limit": "auto_over_raw median <= 1.05", "kept": middle <= 1.05}
    return {"case": "codecs", "state_nbytes": nbytes, "durable": True, **figures, **limit}


def _limit(row: dict[str, float], name: str) -> float:
    """The longer of the bytes' time on the disk and the state's on all cores."""
    disk = row["bare_s"] * row[f"{name}_share"]
    cores = row["zstd_core_s" if name == "zstd" else "raw_core_s"] / len(os.sched_getaffinity(0))
    return max(disk, cores)


def _rounds(directory: Path, state: State, nbytes: int) -> list[dict[str, float]]:
    rng, rows = random.Random(SEED), []
    memory = nbytes + (256 << 20)
    every, keep = gpuckpt.Every(steps=1), gpuckpt.Keep(last=1)
    for name in NAMES:
        (directory / name).mkdir(parents=True)
    ckpts = {
        name: gpuckpt.Checkpointer(
            directory / name, every=every, keep=keep, codec=name, memory=memory, full_every=1
        )
        for name in NAMES
    }
    room = np.ones(AREAS * area_nbytes(_CHUNK_NBYTES), np.uint8)
    slot, source = Arena(room, _CHUNK_NBYTES).take(), aligned_memory(_CHUNK_NBYTES)
    for ckpt in ckpts.values():
        ckpt.resume(state)
    for step in range(1, ROUNDS + 2):
        row = {f"{name}_core_s": _core_seconds(state, name, slot) for name in ("raw", "zstd")}
        for name in rng.sample(NAMES, len(NAMES)):
            row |= {f"{name}_{what}": one for what, one in _save(ckpts[name], state, step).items()}
        begun = time.perf_counter()
        bare(directory / "bare", source, nbytes)
        row["bare_s"] = time.perf_counter() - begun
        (directory / "bare").unlink()
        rows.append(row)
    for ckpt in ckpts.values():
        ckpt.close()
    return rows


def _save(ckpt: gpuckpt.Checkpointer, state: State, step: int) -> dict[str, float]:
    with ckpt.update():
        state["w0"][0] = step
    begun, cpu = time.perf_counter(), time.process_time()
    pending = ckpt.save(step, state)
    checkpoint = pending.result()
    durable, used = time.perf_counter() - begun, time.process_time() - cpu
    ckpt.wait()
    return {
        "durable_s": durable,
        "background_s": pending.stats.background_seconds,
        "cpu_s": used,
        "share": checkpoint.encoded_nbytes / checkpoint.raw_nbytes,
    }


def _core_seconds(state: State, codec: str, slot: Slot) -> float:
    """CPU seconds of this thread for all chunks, from their bytes to what is written."""
    choose, begun = CODECS[codec], time.thread_time()
    for array in state.values():
        raw = array.view(np.uint8)
        for at in range(0, raw.size, _CHUNK_NBYTES):
            chunk = raw[at : at + _CHUNK_NBYTES]
            tries = choose(Samples(chunk, 4, turned=True), chunk.size)
            seen = look(chunk, "float32", 4, slot.planes if any(tries) else None)
            checksum(encode_chosen(chunk, seen.planes or [chunk], tries, slot, turned=True).parts)
    return time.thread_time() - begun
