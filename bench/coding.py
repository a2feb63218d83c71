"""The CPU side of coding, a chunk at a time in one thread: numpy, compiled loops, and a memcpy.

Data is normally distributed float32, of which the base is a step of 1e-3 away;
sparse planes are random bytes at random places.  Ratios are of times taken one
right after another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from bench.timing import Spread, spread
from gpuckpt import deltas, planes, sparse, squares
from gpuckpt.native import Native, native
from gpuckpt.statistics import byte_values

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
    times = [{which: _seconds(work) for which, work in works.items()} for _ in range(rounds + 4)]
    gigabytes = nbytes / 1e9
    return {
        f"{name} numpy_gb_per_s": spread([gigabytes / row["numpy"] for row in times[4:]]),
        f"{name} loops_gb_per_s": spread([gigabytes / row["loops"] for row in times[4:]]),
        f"{name} loops_over_numpy": spread([row["numpy"] / row["loops"] for row in times[4:]]),
        f"{name} loops_over_memcpy": spread([row["memcpy"] / row["loops"] for row in times[4:]]),
    }


def _seconds(work: Work) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


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
    yield from _squares(numbers, nbytes)


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


def _squares(numbers: npt.NDArray[np.float32], nbytes: int) -> Iterator[Operation]:
    halves = np.resize(numbers, nbytes // 2).astype(np.float16)
    with np.errstate(all="ignore"):
        whole = np.square(np.arange(1 << 16, dtype=np.uint16).view(np.float16), dtype=np.float32)
    yield (
        "squares float16",
        lambda: squares.squares_by_table(halves.view(np.uint16), whole),
        lambda: squares.half_squares(halves, lambda: whole),
    )
    wide = np.resize(numbers, nbytes // 2).astype(ml_dtypes.bfloat16)
    yield (
        "squares bfloat16",
        lambda: squares.squares_by_rounding(wide),
        lambda: squares.wide_squares(wide),
    )
    narrow = np.resize(numbers, nbytes).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    values = byte_values("float8_e4m3fn")
    assert values is not None
    pairs = np.add.outer(np.square(values), np.square(values)).ravel()
    known = squares.narrow_of(values, 8, 3)
    yield (
        "squares float8_e4m3fn",
        lambda: squares.squares_by_table(narrow.view(np.uint16), pairs),
        lambda: squares.narrow_squares(narrow, lambda: pairs, known),
    )
