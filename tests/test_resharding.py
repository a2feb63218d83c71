"""A checkpoint of some ranks restores on others, along any axes, bit for bit."""

from __future__ import annotations

import math
import random
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import gpuckpt
from gpuckpt.boxes import Box
from gpuckpt.stores.memory import MemoryStore
from tests.resharding import Piece, divided, grid, restore_pieces, save_pieces, split

Array = npt.NDArray[Any]
DTYPES = ("float32", "bfloat16", "float16", "int8", "float64", "complex64", "U3", ">i4", "bool")


def random_array(rng: random.Random, shape: tuple[int, ...], dtype: str) -> Array:
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    count = math.prod(shape)
    if kind.kind == "U":
        return np.array([f"{n % 1000:03}" for n in range(count)], kind).reshape(shape)
    if kind.kind == "b":
        return np.array([rng.random() < 0.5 for _ in range(count)], kind).reshape(shape)
    return np.frombuffer(rng.randbytes(count * kind.itemsize), kind).reshape(shape).copy()


def random_boxes(rng: random.Random, shape: tuple[int, ...], world: int) -> list[Box]:
    """What the ranks of a world hold: a grid along some axes, even, uneven, empty, overlapping."""
    kind = rng.choice(["even", "even", "uneven", "mesh", "overlapping", "replicated"])
    axes = list(range(len(shape)))
    if kind == "even" or len(shape) < 2:
        return divided(shape, {rng.choice(axes): world} if axes else {})
    if kind == "mesh":
        rows = rng.choice([n for n in range(1, world + 1) if world % n == 0])
        one, other = rng.sample(axes, 2)
        return divided(shape, {one: rows, other: world // rows})
    axis = rng.choice(axes)
    cuts: list[list[int]] = [[] for _ in axes]
    cuts[axis] = [rng.randint(0, shape[axis]) for _ in range(world - 1)]
    boxes = grid(shape, cuts)
    if kind == "replicated":
        return boxes + rng.sample(boxes, rng.randint(0, len(boxes)))
    if kind == "overlapping":
        return [wider(rng, box, shape, axis) for box in boxes]
    return boxes


def wider(rng: random.Random, box: Box, shape: tuple[int, ...], axis: int) -> Box:
    first = rng.randint(0, box.offset[axis])
    last = rng.randint(box.end[axis], shape[axis])
    offset, extents = list(box.offset), list(box.shape)
    offset[axis], extents[axis] = first, last - first
    return Box(tuple(offset), tuple(extents))


def unique(boxes: list[Box]) -> list[Box]:
    """A checkpoint has no shard twice."""
    return list(dict.fromkeys(boxes))


def room_for(rng: random.Random, box: Box, dtype: np.dtype[Any]) -> Array:
    """Memory for a shard: dense, or every other element, or Fortran's order, or reversed."""
    how = rng.choice(["dense", "dense", "strided", "fortran", "reversed"])
    if how == "dense" or not box.shape:
        return np.zeros(box.shape, dtype)
    if how == "fortran":
        return np.zeros(box.shape, dtype, order="F")
    if how == "reversed":
        return np.zeros(box.shape, dtype)[::-1]
    return np.zeros((*box.shape[:-1], 2 * box.shape[-1]), dtype)[..., ::2]


@pytest.mark.parametrize("seed", range(200))
def test_what_n_ranks_saved_m_ranks_restore(seed: int):
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 40) for _ in range(rng.choice([1, 2, 2, 2, 3, 3, 4])))
    while math.prod(shape) > 6000:
        shape = tuple(max(extent // 2, 1) for extent in shape)
    array = random_array(rng, shape, rng.choice(DTYPES))
    saved, wanted = rng.randint(1, 16), rng.randint(1, 16)
    store, codec = MemoryStore(), rng.choice(["raw", "zstd", "auto"])
    boxes = unique(random_boxes(rng, shape, saved))
    chunk = rng.choice([256, 1024, 1 << 16])
    manifest = save_pieces(store, split("w", array, boxes), codec=codec, chunk_nbytes=chunk)
    targets = [
        Piece("w", room_for(rng, box, array.dtype), box, shape)
        for box in random_boxes(rng, shape, wanted)
    ]
    restore_pieces(store, manifest, targets)
    for target in targets:
        assert target.box is not None
        assert target.array.tobytes() == array[target.box.slices].tobytes(), target.box
    loaded = gpuckpt.load("", store=store)["w"]
    assert loaded.tobytes() == array.tobytes()
    assert loaded.dtype == array.dtype
