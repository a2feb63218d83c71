"""The CPU side of coding, a chunk at a time in one thread: numpy, compiled loops, and a memcpy.

Data is normally distributed float32, of which the base is a step of 1e-3 away;
sparse planes are random bytes at random places.  Time is the thread's CPU time,
so that work beside it counts as little as it can; ratios are of times taken one
right after another.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.timing import Spread, spread
from gpuckpt import deltas, planes, sparse
from gpuckpt.arena import AREAS, Arena, Slot
from gpuckpt.coding import Encoded, choose_by_entropy, decode, encode
from gpuckpt.dtypes import is_turned, to_numpy
from gpuckpt.fingerprint import fingerprint
from gpuckpt.look import look
from gpuckpt.native import VARIABLE, Native, native
from gpuckpt.plan import area_nbytes
from gpuckpt.statistics import statistics_of

Bytes = npt.NDArray[np.uint8]
Work = Callable[[], object]
# What is measured, with numpy and with the loops.
Operation = tuple[str, Work, Work]

CHUNK_NBYTES = 4 << 20
ROUNDS = 41  # four more are run first and not counted


def coding(nbytes: int = CHUNK_NBYTES, rounds: int = ROUNDS) -> dict[str, Any]:
    """GB/s of a chunk's bytes for each operation; without the loops only that they are missing."""
    result: dict[str, Any] = {"case": "coding", "chunk_nbytes": nbytes}
    loops = native()
    if loops is None:
        return result | {"loops": "none are there"}
    for name, by_numpy, by_loops in _operations(loops, nbytes):
        result |= _figures(name, by_numpy, by_loops, nbytes, rounds)
    return result


def _figures(
    name: str, by_numpy: Work, by_loops: Work, nbytes: int, rounds: int
) -> dict[str, Spread]:
    source, target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
    works = {"memcpy": lambda: np.copyto(target, source), "numpy": by_numpy, "loops": by_loops}
    times = []
    for _ in range(rounds + 4):
        row = {}
        for which, work in works.items():
            with _only(which):
                row[which] = _seconds(work)
        times.append(row)
    gigabytes = nbytes / 1e9
    return {
        f"{name} numpy_gb_per_s": spread([gigabytes / row["numpy"] for row in times[4:]]),
        f"{name} loops_gb_per_s": spread([gigabytes / row["loops"] for row in times[4:]]),
        f"{name} loops_over_numpy": spread([row["numpy"] / row["loops"] for row in times[4:]]),
        f"{name} loops_over_memcpy": spread([row["memcpy"] / row["loops"] for row in times[4:]]),
    }


@contextmanager
def _only(which: str) -> Iterator[None]:
    """What picks between numpy and the loops picks this one."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "0" if which == "numpy" else "1"
    native.cache_clear()
    native()
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before
        native.cache_clear()


def _seconds(work: Work) -> float:
    begun = time.thread_time()
    work()
    return time.thread_time() - begun


def _operations(loops: Native, nbytes: int) -> Iterator[Operation]:
    rng = np.random.default_rng(7)
    numbers = rng.standard_normal(nbytes // 4, np.float32)
    base = (numbers + 1e-3 * rng.standard_normal(numbers.size, np.float32)).view(np.uint8)
    cur, out = numbers.view(np.uint8), np.ones(nbytes, np.uint8)
    for width in (2, 4, 8):
        yield from _planes(loops, cur, width, out)
        yield from _deltas(loops, cur, base, width, out)
    for share in (0.001, 0.03, 0.3):
        places = rng.random(nbytes) < share
        yield from _sparse(loops, np.where(places, cur | 1, 0).astype(np.uint8), share, out)
    room = np.ones(AREAS * area_nbytes(nbytes), np.uint8)
    slot = Arena(room, nbytes).take()
    for dtype in ("float32", "bfloat16", "float16", "float8_e4m3fn"):
        yield from _whole(numbers, dtype, slot)


def _planes(loops: Native, raw: Bytes, width: int, out: Bytes) -> Iterator[Operation]:
    yield (
        f"split {width}",
        lambda: planes.split_by_numpy(raw, width, out),
        lambda: loops.split(raw, width, out),
    )
    parts = list(raw.reshape(width, -1))
    yield (
        f"join {width}",
        lambda: planes.join_by_numpy(parts, out),
        lambda: loops.join(parts, out),
    )


def _deltas(loops: Native, cur: Bytes, base: Bytes, width: int, out: Bytes) -> Iterator[Operation]:
    yield (
        f"delta {width}",
        lambda: deltas.delta_by_numpy(cur, base, width, out),
        lambda: loops.delta(cur, base, width, out),
    )
    yield (
        f"undelta {width}",
        lambda: deltas.undelta_by_numpy(cur, base, width, out),
        lambda: loops.undelta(cur, base, width, out),
    )
    yield (
        f"delta_split {width}",
        lambda: deltas.delta_split_by_numpy(cur, base, width, out),
        lambda: loops.delta_split(cur, base, width, out),
    )
    parts = list(cur.reshape(width, -1))
    yield (
        f"join_undelta {width}",
        lambda: deltas.join_undelta_by_numpy(parts, base, width, out),
        lambda: loops.join_undelta(parts, base, width, out),
    )


def _sparse(loops: Native, plane: Bytes, share: float, out: Bytes) -> Iterator[Operation]:
    bitmap, room = np.ones(sparse.bitmap_nbytes(plane.size), np.uint8), np.ones_like(plane)
    packed = room[: sparse.pack_sparse(plane, bitmap, room)]
    yield (
        f"pack_sparse {share:.1%}",
        lambda: sparse.pack_sparse_by_numpy(plane, bitmap, room),
        lambda: loops.pack_sparse(plane, bitmap, room),
    )
    yield (
        f"unpack_sparse {share:.1%}",
        lambda: sparse.unpack_sparse_by_numpy(bitmap, packed, out),
        lambda: loops.unpack_sparse(bitmap, packed, out),
    )


def _whole(numbers: npt.NDArray[np.float32], dtype: str, slot: Slot) -> Iterator[Operation]:
    """What is done with a chunk of host memory in a save, and in a restore."""
    kind = to_numpy(dtype)
    raw = np.resize(numbers * 0.02, numbers.nbytes // kind.itemsize).astype(kind).view(np.uint8)
    turned = is_turned(dtype)

    def encoded() -> Encoded:
        return encode([raw], kind.itemsize, slot, choose_by_entropy, turned=turned)

    coded = encoded()
    body, out = np.frombuffer(b"".join(coded.parts), np.uint8).copy(), np.ones_like(raw)
    for name, work in (
        ("encode", encoded),
        (
            "decode",
            lambda: decode(body, coded.planes, slot, [out], "the chunk", turned=coded.turned),
        ),
        ("statistics", lambda: statistics_of(raw, dtype)),
        ("fingerprint", lambda: fingerprint(raw.data)),
        ("look", lambda: look(raw, dtype, kind.itemsize, slot.planes)),
    ):
        yield f"{name} {dtype}", work, work
