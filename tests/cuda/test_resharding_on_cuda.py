"""Shards saved from one world's GPUs and hosts, restored into parts of arrays on a GPU."""

from __future__ import annotations

import random
from typing import Any

import cupy
import numpy as np
import pytest

import gpuckpt
from gpuckpt.boxes import Box
from gpuckpt.resources import Resources
from gpuckpt.stores.memory import MemoryStore
from tests.cuda.gates import Gate
from tests.cuda.held import new_stream
from tests.resharding import Piece, Run, divided, restore_pieces, save_pieces

SHAPE = (24, 60, 18)


def numbers(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def on(kind: Any, array: np.ndarray, boxes: list[Box], name: str = "w") -> list[Piece]:
    return [Piece(name, kind.asarray(array[box.slices]).copy(), box, array.shape) for box in boxes]


def room(rng: random.Random, box: Box) -> Any:
    """An array on the GPU: dense, strided or reversed."""
    how = rng.choice(["dense", "strided", "reversed"])
    if how == "strided":
        return cupy.zeros((*box.shape[:-1], 2 * box.shape[-1]), np.float32)[..., ::2]
    array = cupy.zeros(box.shape, np.float32)
    return array[::-1] if how == "reversed" else array


def is_filled(piece: Piece, array: np.ndarray) -> bool:
    assert piece.box is not None
    return bool(piece.array.get().tobytes() == array[piece.box.slices].tobytes())


@pytest.mark.parametrize("seed", range(12))
def test_ranks_of_another_world_get_their_boxes(seed):
    rng, array, store = random.Random(seed), numbers(seed), MemoryStore()
    one, other = rng.choice([0, 1, 2]), rng.choice([0, 1, 2])
    kind = rng.choice([cupy, cupy, np])
    boxes = divided(SHAPE, {one: rng.randint(1, 5)})
    chunk = rng.choice([1024, 16384])
    manifest = save_pieces(store, on(kind, array, boxes), chunk_nbytes=chunk)
    wanted = divided(SHAPE, {other: rng.randint(1, 5)})
    targets = [Piece("w", room(rng, box), box, SHAPE) for box in wanted if box.count]
    restore_pieces(store, manifest, targets, memory="32 MiB")
    cupy.cuda.Device().synchronize()
    assert all(is_filled(target, array) for target in targets)


@pytest.mark.parametrize("codec", ["zstd", "raw"])
@pytest.mark.parametrize("kind", [cupy, np])
def test_tiles_come_from_gpus_and_to_them(kind, codec):
    """Whole chunks are uploaded in planes, or joined; and parts of chunks joined."""
    shape = (128, 512)
    array, store = numbers(3, shape), MemoryStore()
    pieces = [
        Piece("w", kind.asarray(array[box.slices]).copy(), box, shape, tiled=True)
        for box in divided(shape, {1: 2})
    ]
    manifest = save_pieces(store, pieces, codec=codec)
    assert all(chunk.tiles for entry in manifest.tensors for chunk in entry.chunks)
    boxes = [*divided(shape, {1: 2}), *divided(shape, {0: 4}), *divided(shape, {1: 3})]
    targets = [Piece("w", room(random.Random(at), box), box, shape) for at, box in enumerate(boxes)]
    restore_pieces(store, manifest, targets, memory="32 MiB")
    cupy.cuda.Device().synchronize()
    assert all(is_filled(target, array) for target in targets)
    again = save_pieces(store, pieces, 2, codec=codec, previous=manifest, full_every=10)
    assert again.tensors == manifest.tensors


def test_parts_of_differences_and_of_rounded_copies_come_to_the_gpu():
    shape = (260, 300)
    array, store = numbers(1, shape), MemoryStore()
    pieces = on(cupy, array, divided(shape, {0: 2}))
    copies = [Piece("half", piece.array.astype(np.float16), piece.box, shape) for piece in pieces]
    run = Run([*pieces, *copies], Resources("32 MiB", chunk_nbytes=1 << 20))
    manifest = None
    for step in (1, 2):
        for piece, copy in zip(pieces, copies, strict=True):
            piece.array[...] *= np.float32(1 + 1e-6)
            copy.array[...] = piece.array.astype(np.float16)
        cupy.cuda.Device().synchronize()
        manifest = run.save(store, step, "delta", manifest, 10)
    assert manifest is not None
    chunks = [chunk for entry in manifest.tensors for chunk in entry.chunks]
    assert any(chunk.base for chunk in chunks)
    assert any(chunk.sources for chunk in chunks)
    whole = np.concatenate([piece.array.get() for piece in pieces])
    boxes = divided(shape, {1: 3})
    masters = on(cupy, np.zeros_like(whole), boxes)
    halves = on(cupy, np.zeros(shape, np.float16), boxes, "half")
    restore_pieces(store, manifest, [*masters, *halves], memory="32 MiB")
    cupy.cuda.Device().synchronize()
    assert all(is_filled(target, whole) for target in masters)
    assert all(is_filled(target, whole.astype(np.float16)) for target in halves)


def test_a_part_is_uploaded_after_what_the_callers_stream_still_does():
    array, store, stream = numbers(2), MemoryStore(), new_stream()
    save_pieces(store, on(cupy, array, divided(SHAPE, {0: 2})))
    own = cupy.zeros((24, 20, 18), np.float32)
    cupy.cuda.Device().synchronize()
    leaf = gpuckpt.Sharded(own, SHAPE, (0, 20, 0))
    with gpuckpt.Checkpointer("", store=store, memory="32 MiB") as ckpt:
        with stream:
            gate = Gate(stream)
            own += np.float32(1)
            ckpt.restore({"w": leaf})
        gate.join()
        cupy.cuda.Device().synchronize()
    assert own.get().tobytes() == array[:, 20:40].tobytes()


def test_arrays_that_share_memory_and_are_filled_by_parts_are_looked_at_again():
    array, store = numbers(3), MemoryStore()
    lower = np.ascontiguousarray(array[12:])
    save_pieces(
        store,
        [
            *on(cupy, array, divided(SHAPE, {0: 3})),
            *on(cupy, lower + 1, divided((12, 60, 18), {0: 2}), "other"),
        ],
    )
    whole = cupy.zeros(SHAPE, np.float32)
    with gpuckpt.Checkpointer("", store=store, memory="32 MiB") as ckpt:
        with pytest.raises(gpuckpt.MismatchError, match="shares memory with another array"):
            ckpt.restore({"w": whole, "other": whole[12:]})
        ckpt.restore({"w": whole}, names="w")
    cupy.cuda.Device().synchronize()
    assert whole.get().tobytes() == array.tobytes()


def test_damage_of_a_chunk_that_is_wanted_in_part_is_found():
    array, store = numbers(4), MemoryStore()
    manifest = save_pieces(store, on(cupy, array, divided(SHAPE, {0: 2})), codec="raw")
    extent = manifest.tensors[1].chunks[0].extent
    store.files[extent.segment][extent.offset + 100] ^= 1
    targets = on(cupy, np.zeros_like(array), divided(SHAPE, {1: 2})[:1])
    with pytest.raises(gpuckpt.CorruptError, match=r"w\[12:24, 0:60, 0:18\] in "):
        restore_pieces(store, manifest, targets)
