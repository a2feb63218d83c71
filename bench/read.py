"""What bringing a state back costs: restores by codec, beside plain reads of the same bytes.

Every round does each once, in a new order, into the same arrays: `plain` is a
loop of `readinto` over one file, in one thread, and looks at nothing; `bare`
reads that file by two threads into one piece of memory, past the page cache if
it is cold: as fast as the machine can.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import gpuckpt
from bench.cases import State, state_of
from bench.disk import drop_cache, fill_cache, write_and_sync
from bench.timing import spread
from gpuckpt.stores.blocks import ALIGNMENT, aligned_memory

ROUNDS = 7  # one more is run first and not counted
SEED = 7
PIECE_NBYTES = 4 << 20
CODECS = ("raw", "auto", "zstd")
Way = tuple[Path, Callable[[], None]]


def read(directory: Path, nbytes: int, tensors: int, cache: str) -> dict[str, Any]:
    """Seconds of each way, `cold` or `warm`, and of the CPU; restores over both plain reads."""
    state = state_of(nbytes, tensors)
    ways = _ways(directory, state, os.O_DIRECT if cache == "cold" else 0)
    settle = drop_cache if cache == "cold" else fill_cache
    rng, rows = random.Random(SEED), []
    for _ in range(ROUNDS + 1):
        row: dict[str, tuple[float, float]] = {}
        for name in rng.sample(sorted(ways), len(ways)):
            place, run = ways[name]
            settle(place)
            begun, cpu = time.perf_counter(), time.process_time()
            run()
            row[name] = (time.perf_counter() - begun, time.process_time() - cpu)
        rows.append(row)
    rows = rows[1:]
    return {
        "case": f"read-{cache}",
        "state_nbytes": nbytes,
        "tensors": tensors,
        **{f"{name}_s": spread([row[name][0] for row in rows]) for name in ways},
        **{f"{name}_cpu_s": spread([row[name][1] for row in rows]) for name in ways},
        **{
            f"{codec}_over_{other}": spread([row[codec][0] / row[other][0] for row in rows])
            for codec in CODECS
            for other in ("plain", "bare")
        },
    }


def _ways(directory: Path, state: State, flags: int) -> dict[str, Way]:
    plain = directory / "plain"
    plain.mkdir(parents=True)
    file = plain / "plain.bin"
    write_and_sync(file, state.values())
    nbytes = sum(array.nbytes for array in state.values())
    room = aligned_memory(-(-nbytes // ALIGNMENT) * ALIGNMENT)
    room[:] = 1
    ways: dict[str, Way] = {
        "plain": (plain, lambda: _read_plain(file, state)),
        "bare": (plain, lambda: _read_bare(file, room, flags)),
    }
    for codec in CODECS:
        gpuckpt.save(directory / codec, state, 1, codec=codec)
        ckpt = gpuckpt.Checkpointer(directory / codec)
        ways[codec] = (directory / codec, lambda ckpt=ckpt: ckpt.restore(state))  # type: ignore[misc]
    return ways


def _read_plain(path: Path, state: State) -> None:
    with path.open("rb", buffering=0) as file:
        for array in state.values():
            view = array.reshape(-1).view(np.uint8).data
            while view.nbytes:
                view = view[file.readinto(view) :]


def _read_bare(path: Path, room: npt.NDArray[np.uint8], flags: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        with ThreadPoolExecutor(2) as threads:
            found = sum(
                threads.map(
                    lambda at: os.preadv(descriptor, [room[at : at + PIECE_NBYTES].data], at),
                    range(0, room.size, PIECE_NBYTES),
                )
            )
    finally:
        os.close(descriptor)
    assert found == path.stat().st_size, f"{found} bytes"
