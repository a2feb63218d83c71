"""A checkpoint of some ranks restores on others, along any axes, bit for bit."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import gpuckpt
from gpuckpt.boxes import Box
from gpuckpt.cutting import cut
from gpuckpt.fallback import Restoration
from gpuckpt.loading import fill_match, load_state
from gpuckpt.manifest import Manifest
from gpuckpt.matching import match
from gpuckpt.resources import Resources
from gpuckpt.shards import Shards
from gpuckpt.stores.memory import MemoryStore
from gpuckpt.tree import flatten
from tests.resharding import (
    CountingStore,
    Piece,
    Run,
    divided,
    grid,
    needed_nbytes,
    restore_pieces,
    save_pieces,
    split,
    tensor_of,
)

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


def half(array: Array, first: bool) -> Piece:
    """The upper or the lower half of a tensor, to be filled."""
    rows = array.shape[0] // 2
    box = Box((0 if first else rows, *([0] * (array.ndim - 1))), (rows, *array.shape[1:]))
    return Piece("w", np.zeros(box.shape, array.dtype), box, array.shape)


def by_rows(array: Array, count: int, name: str = "w") -> list[Piece]:
    return split(name, array, divided(array.shape, {0: count}))


def test_deltas_of_shards_are_restored_by_other_ranks():
    rng = np.random.default_rng(1)
    array = rng.standard_normal((512, 300), np.float32)
    store, pieces = MemoryStore(), by_rows(array, 2)
    run, manifest = Run(pieces, Resources("256 MiB", chunk_nbytes=1 << 20)), None
    for step in (1, 2, 3):
        for piece in pieces:
            piece.array[...] *= np.float32(1.0001)
        manifest = run.save(store, step, "delta", manifest, 10)
    array = np.concatenate([piece.array for piece in pieces])
    assert manifest is not None
    assert any(chunk.base for entry in manifest.tensors for chunk in entry.chunks)
    targets = split("w", np.zeros_like(array), divided(array.shape, {1: 3}))
    restore_pieces(store, manifest, targets)
    for target in targets:
        assert target.box is not None
        assert target.array.tobytes() == array[target.box.slices].tobytes()


def test_rounded_copies_of_shards_are_derived_and_restored_by_other_ranks():
    master = np.random.default_rng(2).standard_normal((600, 400), np.float32)
    copy = master.astype(ml_dtypes.bfloat16)
    pieces = [*by_rows(master, 3, "master"), *by_rows(copy, 3, "copy")]
    store = MemoryStore()
    manifest = save_pieces(store, pieces)
    derived = [entry for entry in manifest.tensors if any(c.sources for c in entry.chunks)]
    assert {entry.spec.name for entry in derived} == {"copy"}
    assert len(derived) == 3
    again = save_pieces(store, pieces, 2, previous=manifest, full_every=10)
    assert again.tensors == manifest.tensors, "nothing of it is written twice"
    boxes = divided(master.shape, {0: 2, 1: 2})
    targets = [
        *split("copy", np.zeros_like(copy), boxes),
        *split("master", np.zeros_like(master), boxes[:1]),
    ]
    restore_pieces(store, manifest, targets)
    for target in targets:
        assert target.box is not None
        wanted = {"copy": copy, "master": master}[target.name][target.box.slices]
        assert target.array.tobytes() == wanted.tobytes(), target.name


def test_a_shard_that_has_not_changed_is_not_written_again():
    array = np.arange(40_000.0)
    store = MemoryStore()
    first = save_pieces(store, by_rows(array, 4))
    array[10] = -1
    second = save_pieces(store, by_rows(array, 4), 2, previous=first, full_every=10)
    fresh = [e.spec.offset for e in second.tensors if e.version == 2]
    assert fresh == [(0,)]
    assert [e.chunks for e in second.tensors[1:]] == [e.chunks for e in first.tensors[1:]]


def test_damage_is_blamed_on_the_shard_and_others_are_restored():
    array = np.random.default_rng(3).standard_normal((64, 64))
    store = MemoryStore()
    manifest = save_pieces(store, by_rows(array, 4), codec="raw")
    (extent,) = (chunk.extent for chunk in manifest.tensors[2].chunks)
    store.files[extent.segment][extent.offset + 5] ^= 1
    with pytest.raises(gpuckpt.CorruptError) as error:
        restore_pieces(store, manifest, split("w", array, divided(array.shape, {1: 3})))
    assert error.value.where.startswith("w[32:48, 0:64] in memory/")
    (upper,) = [half(array, first=True)]
    restore_pieces(store, manifest, [upper])
    assert upper.array.tobytes() == array[:32].tobytes()


def test_a_chunk_that_is_wanted_in_part_is_looked_at_whole():
    """What the checksum of the bytes on disk lets through, the fingerprint doesn't."""
    array = np.random.default_rng(3).standard_normal((64, 64))
    store = MemoryStore()
    manifest = save_pieces(store, by_rows(array, 2))
    (chunk,) = manifest.tensors[0].chunks
    other = replace(manifest.tensors[0], chunks=(replace(chunk, fingerprint="0" * 32),))
    manifest = replace(manifest, tensors=(other, manifest.tensors[1]))
    with pytest.raises(gpuckpt.CorruptError, match="fingerprint of the decoded bytes"):
        restore_pieces(store, manifest, split("w", np.zeros((64, 64)), [Box((3, 3), (2, 2))]))


def test_what_no_shard_has_is_named_before_anything_is_read():
    array = np.arange(64.0).reshape(8, 8)
    store = CountingStore()
    pieces = by_rows(array, 4)
    save_pieces(store, [*pieces[:1], *pieces[2:]])
    store.read_nbytes = 0
    with pytest.raises(gpuckpt.NotFoundError, match=r"w: \[2:4, 0:8\] of it is in none of the 3"):
        gpuckpt.load("", store=store)
    state = {"w": np.ones((8, 8))}
    with (
        gpuckpt.Checkpointer("", store=store) as ckpt,
        pytest.raises(gpuckpt.MismatchError, match=r"w: \[2:4, 0:8\] of it is in none"),
    ):
        ckpt.restore(state)
    assert (state["w"] == 1).all()


def test_a_tensor_of_another_whole_shape_does_not_fit():
    store = MemoryStore()
    save_pieces(store, by_rows(np.zeros((8, 8)), 4))
    with gpuckpt.Checkpointer("", store=store) as ckpt:
        with pytest.raises(
            gpuckpt.MismatchError, match=r"w: float64\[8, 9\] here, float64\[8, 8\]"
        ):
            ckpt.restore({"w": np.zeros((8, 9))})
        target = {"w": np.zeros((8, 8), order="F")}
        ckpt.restore(target)


def test_each_rank_reads_little_more_than_it_needs():
    array = random_array(random.Random(4), (1024, 2048), "bfloat16")
    store = CountingStore()
    for saved, wanted in ((2, 3), (3, 2), (8, 5), (1, 16), (16, 1)):
        manifest = save_pieces(store, by_rows(array, saved), saved * 100 + wanted)
        boxes = divided(array.shape, {0: wanted})
        store.read_nbytes = 0
        for box in boxes:
            restore_pieces(
                store, manifest, [Piece("w", np.empty_like(array[box.slices]), box, array.shape)]
            )
        assert store.read_nbytes <= 1.1 * needed_nbytes(manifest, {"w": boxes}), (saved, wanted)


def test_columns_of_shards_that_are_cut_are_read_alone():
    array = random_array(random.Random(5), (512, 4096), "bfloat16")
    store = CountingStore()
    spec = tensor_of(Piece("w", array)).spec
    boxes = []
    for box in divided(array.shape, {1: 2}):
        own = replace(spec, shape=box.shape, offset=box.offset, whole=array.shape)
        boxes += cut(own)
    manifest = save_pieces(store, split("w", array, boxes))
    store.read_nbytes = 0
    targets = divided(array.shape, {1: 3})
    for box in targets:
        restore_pieces(
            store, manifest, [Piece("w", np.empty_like(array[box.slices]), box, array.shape)]
        )
    assert store.read_nbytes <= 1.1 * needed_nbytes(manifest, {"w": targets})


def test_shards_of_one_process_that_want_the_same_chunk_read_it_once():
    array = random_array(random.Random(6), (64, 1024), "float32")
    store = CountingStore()
    manifest = save_pieces(store, [Piece("w", array)])
    store.read_nbytes = 0
    targets = split("w", np.zeros_like(array), divided(array.shape, {1: 8}))
    restore_pieces(store, manifest, targets)
    assert store.read_nbytes == manifest.encoded_nbytes
    assert all(t.array.tobytes() == array[t.box.slices].tobytes() for t in targets if t.box)


def test_more_shards_than_a_slot_takes_are_filled_by_and_by():
    array = np.random.default_rng(1).integers(0, 255, 4096, np.uint8)
    store = MemoryStore()
    manifest = save_pieces(store, [Piece("w", array)], chunk_nbytes=4096)
    boxes = [*divided(array.shape, {0: 300}), *(Box((at,), (4000,)) for at in range(4))]
    targets = [
        Piece("w", np.zeros(2 * box.shape[0], np.uint8)[::2], box, array.shape) for box in boxes
    ]
    restore_pieces(store, manifest, targets, chunk_nbytes=4096)
    assert all(t.array.tobytes() == array[t.box.slices].tobytes() for t in targets if t.box)


def test_parts_of_one_array_are_not_taken_for_arrays_that_share_memory(monkeypatch):
    array = np.arange(64.0).reshape(8, 8)
    store = MemoryStore()
    manifest = save_pieces(store, split("w", array, divided(array.shape, {1: 4})))
    monkeypatch.setattr("gpuckpt.restore._check_filled", None)
    target = Piece("w", np.zeros((8, 8)))
    restore_pieces(store, manifest, [target])
    assert target.array.tobytes() == array.tobytes()


def test_arrays_that_share_memory_and_are_filled_by_parts_are_looked_at_again():
    array, other = np.arange(64.0).reshape(8, 8), np.arange(64.0, 96).reshape(4, 8)
    store = MemoryStore()
    save_pieces(store, [*by_rows(array, 3), *by_rows(other, 2, "other")])
    room = np.zeros((8, 8))
    with gpuckpt.Checkpointer("", store=store) as ckpt:
        with pytest.raises(gpuckpt.MismatchError, match="shares memory with another array"):
            ckpt.restore({"w": room, "other": room[4:]})
        ckpt.restore({"w": room}, names="w")
    assert room.tobytes() == array.tobytes()


def test_a_sharded_leaf_gets_its_box_and_nothing_else():
    array = np.arange(64.0).reshape(8, 8)
    store = MemoryStore()
    save_pieces(store, by_rows(array, 3))
    own = np.zeros((5, 3))
    with gpuckpt.Checkpointer("", store=store) as ckpt:
        ckpt.restore({"w": gpuckpt.Sharded(own, shape=(8, 8), offset=(2, 4))})
    assert own.tobytes() == array[2:7, 4:7].tobytes()


def test_a_sharded_leaf_that_is_read_only_is_made_anew():
    array = np.arange(64.0).reshape(8, 8)
    store = MemoryStore()
    save_pieces(store, by_rows(array, 3))
    own = np.zeros((5, 3))
    own.flags.writeable = False
    state = {"w": gpuckpt.Sharded(own, shape=(8, 8), offset=(2, 4))}
    with gpuckpt.Checkpointer("", store=store) as ckpt:
        ckpt.restore(state)
    assert not own.any()
    assert isinstance(state["w"], gpuckpt.Sharded)
    assert state["w"].offset == (2, 4)
    assert state["w"].array.tobytes() == array[2:7, 4:7].tobytes()


def test_a_shard_that_the_files_here_lack_is_named_with_the_parts_that_are_not_here():
    array = np.arange(64.0).reshape(8, 8)
    store = MemoryStore()
    manifest = save_pieces(store, by_rows(array, 4)[:2])
    shards = Shards(replace(manifest, absent=("step-1.r1.part.json",)))
    told = shards.lack(0, divided(array.shape, {})[0])
    assert told is not None
    assert told.startswith("[4:8, 0:8] of it is in none of the 2 shards that are here")
    assert told.endswith("these files aren't: step-1.r1.part.json")


class Own:
    """State of one rank's own."""

    def __init__(self, value: float) -> None:
        self.value = np.full(3, value, float)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value[...] = state["value"]


def of_two_ranks(store: MemoryStore) -> Manifest:
    """Two ranks' own under one name, and what they have together."""
    pieces = [
        *by_rows(np.arange(8.0), 2),
        Piece("own.value", np.zeros(3), rank=0),
        Piece("own.value", np.ones(3), rank=1),
    ]
    manifest = save_pieces(store, pieces)
    own: Any = [[rank, {"object": {"dict": [["value", {"tensor": 2 + rank}]]}}] for rank in (0, 1)]
    pairs: list[Any] = [["w", {"tensor": 1}], ["own", {"ranks": own}]]
    return replace(manifest, structure={"dict": [*pairs, ["many", {"list": [{"ranks": own}]}]]})


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_gets_what_is_its_own(rank: int):
    store = MemoryStore()
    manifest = of_two_ranks(store)
    state: dict[str, Any] = {"w": np.zeros(8), "own": Own(7), "many": [Own(7)]}
    flat = flatten(state)
    found = match(flat, manifest, rank=rank)
    found.raise_if_not_exact("state")
    fill_match(state, flat, found, manifest, store, Resources("64 MiB"))
    assert state["own"].value.tolist() == [rank] * 3
    assert state["many"][0].value.tolist() == [rank] * 3
    assert state["w"].tolist() == list(range(8))


def test_what_a_checkpoint_has_not_of_a_rank_keeps_its_value_and_is_told(caplog):
    store = MemoryStore()
    manifest = of_two_ranks(store)
    state: dict[str, Any] = {"w": np.zeros(8), "own": Own(7), "many": [Own(7)]}
    restoration = Restoration(
        *(state, Resources("64 MiB")), names=None, rename=None, strict=True, rank=2
    )
    found = restoration.take(store, manifest)
    assert found.kept == ["own.value", "many.0.value"]
    assert state["own"].value.tolist() == state["many"][0].value.tolist() == [7] * 3
    assert state["w"].tolist() == list(range(8))
    assert "nothing of rank 2's own; kept as they are: own.value, many.0.value" in caplog.text


def test_an_object_keeps_what_inside_of_it_is_a_ranks_own_and_not_there():
    class Outer:
        def __init__(self) -> None:
            self.own = Own(7)
            self.loaded: dict[str, Any] = {}

        def state_dict(self) -> dict[str, Any]:
            return {"w": np.zeros(8), "own": self.own, "list": [self.own]}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.loaded = state

    store = MemoryStore()
    manifest = of_two_ranks(store)
    pairs = manifest.structure["dict"]
    inner = {"dict": [pairs[0], pairs[1], ["list", pairs[2][1]]]}
    manifest = replace(manifest, structure={"dict": [["outer", {"object": inner}]]})
    outer = Outer()
    state, flat = {"outer": outer}, flatten({"outer": outer})
    found = match(flat, manifest, rank=5)
    fill_match(state, flat, found, manifest, store, Resources("64 MiB"))
    assert outer.loaded["own"] is outer.own
    assert outer.loaded["list"] == [outer.own]
    assert outer.loaded["w"].tolist() == list(range(8))


def test_one_tensor_by_the_numbers_of_two_of_its_rows_is_one_array():
    store = MemoryStore()
    manifest = save_pieces(store, by_rows(np.arange(8.0), 2))
    tied = {"dict": [["a", {"tensor": 0}], ["b", {"tensor": 1}]]}
    loaded = load_state(replace(manifest, structure=tied), store, Resources("64 MiB"))
    assert loaded["a"] is loaded["b"]
