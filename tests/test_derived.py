"""A tensor that is another one rounded is stored as that fact, and comes back bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.arena import AREAS, Arena
from gpuckpt.commit import open_step
from gpuckpt.derived import Derivation, Derived
from gpuckpt.filled import Filled
from gpuckpt.fingerprint import fingerprint
from gpuckpt.layout import segment_name, segment_step
from gpuckpt.manifest import Manifest, pack_manifest, unpack_manifest
from gpuckpt.plan import area_nbytes, make_plans
from gpuckpt.resources import Resources
from gpuckpt.spec import Chunk, ChunkEntry, Extent, Plane, Spec
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.memory import MemoryAppender, MemoryStore
from gpuckpt.tensors import TensorEntry
from gpuckpt.verify import verify_step
from tests.saving import save
from tests.shares import tensor_of
from tests.test_layers import body_of, read_strangers_index, resealed

# Of float32 as many bytes as make a leaf when they are rounded.
CHUNK = 128 << 10
KINDS: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def numbers(seed: int, count: int = 70_000) -> Any:
    return np.random.default_rng(seed).standard_normal(count, np.float32)


def mixed(
    kind: Any, shapes: tuple[tuple[int, ...], ...] = ((350, 200), (350, 200), (5030,))
) -> Any:
    """Copies, which come first, moments and masters: a mixed-precision state."""
    masters = [
        numbers(at, int(np.prod(shape))).reshape(shape) for at, shape in enumerate(shapes, 1)
    ]
    return {
        "model": {str(at): w.astype(kind) for at, w in enumerate(masters)},
        "optimizer": {
            str(at): {"moment": w * w, "master": w, "step": at} for at, w in enumerate(masters)
        },
    }


def checkpoints(store: Any, **options: Any) -> gpuckpt.Checkpointer:
    defaults: dict[str, Any] = {"memory": "8 MiB", "chunk_nbytes": CHUNK, "snapshot": "hold"}
    return gpuckpt.Checkpointer("", store=store, **(defaults | options))


def entry_of(store: Any, name: str, step: int | None = None) -> TensorEntry:
    (found,) = [one for one in open_step(store, step).tensors if one.spec.name == name]
    return found


def derived(store: Any, name: str, step: int | None = None) -> list[bool]:
    return [chunk.sources != () for chunk in entry_of(store, name, step).chunks]


def is_right(store: Any, step: int, state: dict[str, Any]) -> bool:
    found = gpuckpt.load("", step, store=store, memory="64 MiB")
    whole = verify_step(store, step, Resources("8 MiB", chunk_nbytes=CHUNK)) == []
    return whole and all(found[name].tobytes() == state[name].tobytes() for name in state)


@pytest.mark.parametrize("snapshot", ["copy", "hold"])
@pytest.mark.parametrize("codec", ["auto", "raw", "zstd", "delta"])
@pytest.mark.parametrize("dtype", KINDS)
def test_copies_of_a_mixed_precision_state_take_no_bytes_and_come_back(dtype, codec, snapshot):
    store, kind = MemoryStore(), KINDS[dtype]
    state = mixed(kind)
    copies = sum(array.nbytes for array in state["model"].values())
    with checkpoints(store, codec=codec, snapshot=snapshot) as ckpt:
        for step in range(1, 4):
            with ckpt.update():
                for at, one in state["optimizer"].items():
                    one["master"] *= np.float32(1.001)
                    state["model"][at][...] = one["master"].astype(kind)
            stats = save(ckpt, step, state)
            assert stats.derived_nbytes == copies
            assert stats.encoded_nbytes <= stats.raw_nbytes - copies
        wanted = {name: array.tobytes() for name, array in state["model"].items()}
        for array in state["model"].values():
            array[...] = 0
        ckpt.restore(state)
        assert {name: array.tobytes() for name, array in state["model"].items()} == wanted
    assert [derived(store, f"model.{at}") for at in range(3)] == [[True] * 2, [True] * 2, [True]]
    assert verify_step(store, 3, Resources("8 MiB", chunk_nbytes=CHUNK)) == []


def test_a_save_that_stands_alone_derives_too(tmp_path):
    gpuckpt.save(tmp_path, mixed(np.float16), 1)
    manifest = open_step(LocalStore(tmp_path))
    copies = [one for one in manifest.tensors if one.spec.dtype == "float16"]
    assert all(chunk.sources and not chunk.extent.length for e in copies for chunk in e.chunks)


def test_a_copy_is_read_without_its_master():
    store, state = MemoryStore(), mixed(np.float16)
    with checkpoints(store) as ckpt:
        save(ckpt, 1, state)
        wanted = state["model"]["1"].tobytes()
        state["model"]["1"][...] = 0
        ckpt.restore(state, names=["model.1"])
        assert state["model"]["1"].tobytes() == wanted
    found = gpuckpt.load("", names=["model.1"], store=store, memory="64 MiB")
    assert found["model.1"].tobytes() == wanted
    target = {"model": {"1": np.zeros((350, 200), np.float16)}}
    with checkpoints(store) as ckpt:
        ckpt.restore(target, strict=False)
    assert target["model"]["1"].tobytes() == wanted


def test_a_chunk_that_differs_is_stored_and_the_others_are_not():
    store, master = MemoryStore(), numbers(1, 200_000)
    copy = master.astype(np.float16)
    copy[100_000] += np.float16(1)
    state = {"copy": copy, "master": master}
    with checkpoints(store) as ckpt:
        stats = save(ckpt, 1, state)
    assert derived(store, "copy") == [True, False, True, True]
    assert stats.derived_nbytes == copy.nbytes - CHUNK
    assert is_right(store, 1, state)


def test_a_master_of_another_shape_is_one():
    store, master = MemoryStore(), numbers(1)
    state = {"copy": master.astype(np.float16).reshape(350, 200), "master": master}
    with checkpoints(store) as ckpt:
        assert save(ckpt, 1, state).derived_nbytes == 140_000
    assert is_right(store, 1, state)


def test_strided_tensors_are_paired_by_the_order_of_their_elements():
    store, master = MemoryStore(), numbers(1).reshape(350, 200)
    state = {"copy": np.ascontiguousarray(master.T.astype(np.float16)), "master": master.T}
    for snapshot in ("copy", "hold"):
        with checkpoints(store, snapshot=snapshot) as ckpt:
            assert save(ckpt, 1, state).derived_nbytes == 140_000
        assert is_right(store, 1, state)


@pytest.mark.parametrize(
    ("copy", "master"),
    [
        (numbers(1).astype(np.float16), numbers(2)),
        (np.zeros(70_000, np.float16), np.zeros(70_000, np.float32)),
        (numbers(1).astype(np.float16), numbers(1).astype(np.float64)),
        (numbers(1).astype(">f2"), numbers(1)),
        (numbers(1).astype(np.float16), numbers(1).astype(">f4")),
        (numbers(1, 4095).astype(np.float16), numbers(1, 4095)),
        (numbers(1, 60_000).astype(np.float16), numbers(1)),
    ],
    ids=["unlike", "constant", "wide", "big-endian", "big-endian master", "small", "shorter"],
)
def test_what_is_no_copy_is_stored(copy, master):
    store, state = MemoryStore(), {"copy": copy, "master": master}
    with checkpoints(store) as ckpt:
        assert save(ckpt, 1, state).derived_nbytes == 0
    assert open_step(store).tensors[0].chunks[0].sources == ()
    assert is_right(store, 1, state)


def test_chunks_whose_leaves_would_be_cut_are_stored():
    store, master = MemoryStore(), numbers(1)
    state = {"copy": master.astype(np.float16), "master": master}
    with checkpoints(store, chunk_nbytes=100_000) as ckpt:
        save(ckpt, 1, state)
    assert derived(store, "copy") == [False, True]
    assert is_right(store, 1, state)


CHANGES: dict[str, Any] = {
    "master gone": lambda state: state.pop("master"),
    "master renamed": lambda state: state.update(other=state.pop("master")),
    "master of another type": lambda state: state.update(master=state["master"].astype(float)),
    "copy of another type": lambda state: state.update(
        copy=state["master"].astype(ml_dtypes.bfloat16)
    ),
    "another master": lambda state: state.update(
        master=state["moment"], moment=state["master"], copy=state["moment"].astype(np.float16)
    ),
    "copy left behind": lambda state: state["master"].__imul__(np.float32(2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_pairs_may_change_from_save_to_save(change):
    store, master = MemoryStore(), numbers(1)
    state = {"moment": numbers(2), "copy": master.astype(np.float16), "master": master}
    with checkpoints(store, keep=gpuckpt.Keep(last=1)) as ckpt:
        save(ckpt, 1, state)
        CHANGES[change](state)
        for step in (2, 3):
            save(ckpt, step, state)
            assert is_right(store, step, state)
    # If its master has gone, a copy that hasn't changed is derived from what that was.
    assert derived(store, "copy") == [True, True]


def test_what_has_not_changed_is_not_written_again():
    store, master = MemoryStore(), numbers(1)
    state = {"copy": master.astype(np.float16), "master": master, "other": numbers(2)}
    with checkpoints(store) as ckpt:
        save(ckpt, 1, state)
        stats = save(ckpt, 2, state)
    assert (stats.written_nbytes, stats.derived_nbytes) == (0, 140_000)
    assert open_step(store, 2).segments == open_step(store, 1).segments
    assert entry_of(store, "copy", 2).version == 1


def test_prune_keeps_the_segment_of_a_master_that_only_a_copy_needs_still():
    store, master = MemoryStore(), numbers(1)
    state = {"copy": master.astype(np.float16), "master": master}
    with checkpoints(store, keep=gpuckpt.Keep(last=1)) as ckpt:
        save(ckpt, 1, state)
        del state["master"]
        save(ckpt, 2, state)
        assert ckpt.steps() == [2]
    assert {segment_step(name) for name in store.names()} - {None} == {1}
    assert is_right(store, 2, state)


def test_a_checkpoint_that_is_to_be_full_derives_from_its_own_files():
    store, master = MemoryStore(), numbers(1)
    state = {"copy": master.astype(np.float16), "master": master}
    with checkpoints(store, full_every=1) as ckpt:
        save(ckpt, 1, state)
        assert save(ckpt, 2, state).derived_nbytes == 140_000
    assert {segment_step(name) for name in open_step(store, 2).segments} == {2}


def test_a_copy_that_is_no_copy_any_more_is_no_delta_of_what_was_derived():
    store, master = MemoryStore(), numbers(1)
    state = {"copy": master.astype(np.float16), "master": master}
    with checkpoints(store, codec="delta") as ckpt:
        save(ckpt, 1, state)
        for step in (2, 3):
            state["copy"].view(np.uint16)[::1000] += 1
            save(ckpt, step, state)
            assert is_right(store, step, state)
    assert [chunk.base for chunk in entry_of(store, "copy", 2).chunks] == [None, None]
    assert entry_of(store, "copy", 3).chunks[0].base is not None


def test_a_chunk_that_came_to_be_derived_is_no_base_though_its_bytes_are_kept():
    store, copy = MemoryStore(), numbers(1).astype(np.float16)
    state = {"copy": copy, "master": numbers(2)}
    with checkpoints(store, codec="delta") as ckpt:
        assert save(ckpt, 1, state).derived_nbytes == 0
        state["master"] = copy.astype(np.float32)
        assert save(ckpt, 2, state).derived_nbytes == copy.nbytes
        copy.view(np.uint16)[::1000] += 1
        save(ckpt, 3, state)
    assert [chunk.base for chunk in entry_of(store, "copy", 3).chunks] == [None, None]
    assert is_right(store, 3, state)


def test_a_master_that_is_a_delta_gives_its_copy_and_chains_stay_bounded():
    store, master = MemoryStore(), numbers(1)
    state, chains = {"copy": master.astype(np.float16), "master": master}, []
    with checkpoints(store, codec="delta", full_every=3) as ckpt:
        for step in range(1, 8):
            master.view(np.uint32)[::50] += 1
            state["copy"] = master.astype(np.float16)
            assert save(ckpt, step, state).derived_nbytes == 140_000
            assert is_right(store, step, state)
            chunks = entry_of(store, "copy").chunks
            chains.append(max(len(one.chain) for chunk in chunks for one in chunk.sources))
    assert set(chains) == {1, 2, 3}


def test_damage_of_a_master_is_named_where_it_is(tmp_path):
    state = {"copy": numbers(1).astype(np.float16), "master": numbers(1)}
    gpuckpt.save(tmp_path, state, 1)
    store = LocalStore(tmp_path)
    extent = entry_of(store, "master").chunks[0].extent
    file = tmp_path / extent.segment
    data = bytearray(file.read_bytes())
    data[extent.offset + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(gpuckpt.CorruptError, match=r"copy .*derived.* at offset 64"):
        gpuckpt.load(tmp_path, names=["copy"])
    damage = verify_step(store, 1, Resources("64 MiB"))
    assert [one.tensor for one in damage] == ["copy", "master"]
    assert {one.file for one in damage} == {extent.segment}
    assert {one.offset for one in damage} == {extent.offset}


def test_a_master_whose_bytes_are_others_is_found_by_the_copys_fingerprint(tmp_path):
    """The row of a copy names chunks that are whole, but not those that it was made of."""
    one, other = numbers(1), numbers(2)
    state = {"copy": one.astype(np.float16), "master": one, "other": other}
    gpuckpt.save(tmp_path, state, 1)
    manifest = open_step(LocalStore(tmp_path))
    rows = {entry.spec.name: entry for entry in manifest.tensors}
    text = (tmp_path / "step-000000000001.manifest.json").read_text()
    assert rows["copy"].chunks[0].sources == rows["master"].chunks
    assert rows["master"].chunks[0].fingerprint in text
    wrong = replace(rows["copy"].chunks[0], sources=rows["other"].chunks)
    tensors = tuple(
        replace(entry, chunks=(wrong,)) if entry.spec.name == "copy" else entry
        for entry in manifest.tensors
    )
    packed = pack_manifest(replace(manifest, tensors=tensors))
    (tmp_path / "step-000000000001.manifest.json").write_bytes(packed)
    with pytest.raises(gpuckpt.CorruptError, match="fingerprint"):
        gpuckpt.load(tmp_path)


def test_a_segment_alone_gives_the_copies_of_its_masters(tmp_path):
    state = mixed(ml_dtypes.bfloat16)
    gpuckpt.save(tmp_path, state, 1)
    (segment,) = tmp_path.glob("*.segment")
    moved = tmp_path / "elsewhere" / segment.name
    moved.parent.mkdir()
    segment.rename(moved)
    target = {"model": {"0": np.zeros((350, 200), ml_dtypes.bfloat16)}}
    report = gpuckpt.warm_start(target, moved)
    assert list(report.matched) == ["model.0"]
    assert target["model"]["0"].tobytes() == state["model"]["0"].tobytes()


class FullAppender(MemoryAppender):
    """A file that has no room for a chunk."""

    def append(self, parts: Any) -> None:
        if sum(map(len, parts)) > 1000:
            raise gpuckpt.StorageError("the disk is full")
        super().append(parts)


class FullStore(MemoryStore):
    """A store whose files are full at once."""

    def create(self, name: str) -> MemoryAppender:
        appender = super().create(name)
        appender.__class__ = FullAppender
        return appender


def test_a_save_that_fails_leaves_nobody_waiting():
    with checkpoints(FullStore(), memory="2 MiB", on_error="warn") as ckpt:
        pending = ckpt.save(1, mixed(np.float16))
        with pytest.raises(gpuckpt.StorageError):
            pending.result(30)
        with pytest.warns(RuntimeWarning, match="full"):
            ckpt.wait()
    assert not [one for one in threading.enumerate() if one.name.startswith("gpuckpt-work")]


def new_derivation() -> tuple[Derivation, Any, list[Chunk]]:
    specs = [Spec("copy", "float16", (70_000,)), Spec("master", "float32", (70_000,))]
    plans = make_plans(specs, [(2,), (4,)], {"cpu": [0, 1]}, chunk_nbytes=CHUNK, split=True)
    chunks = [chunk for batch in plans["cpu"].batches for chunk in batch]
    return Derivation({0: 1}, plans.values()), specs[0], chunks


def test_masters_come_before_their_copies():
    _, _, chunks = new_derivation()
    assert [chunk.tensor for chunk in chunks] == [1, 1, 1, 0, 0]


def test_of_a_master_that_was_not_brought_nothing_is_derived_and_nobody_waits():
    derivation, spec, chunks = new_derivation()
    master = numbers(1).view(np.uint8)
    copy = numbers(1).astype(np.float16).view(np.uint8)
    arena = Arena(np.empty(AREAS * area_nbytes(CHUNK), np.uint8), CHUNK)
    derivation.take(chunks[0], [master[:CHUNK]], arena)
    derivation.take(chunks[1], (), arena)
    assert derivation.find(chunks[3], spec, fingerprint(copy[:CHUNK].data)) is None


def test_a_copys_chunks_have_their_sources_and_no_others_have_any():
    derivation, _, chunks = new_derivation()
    assert [derivation.is_master(one) for one in chunks] == [True, True, True, False, False]
    assert [list(derivation.sources(one)) for one in chunks] == [
        *([], [], []),
        *(chunks[:2], chunks[2:3]),
    ]


def test_a_copy_waits_for_its_masters_chunks_and_for_no_others():
    derivation, spec, chunks = new_derivation()
    master = numbers(1).view(np.uint8)
    copy = numbers(1).astype(np.float16).view(np.uint8)
    arena, found = Arena(np.empty(AREAS * area_nbytes(CHUNK), np.uint8), CHUNK), []

    def look() -> None:
        one = chunks[3]
        print_ = fingerprint(copy[one.start : one.start + one.nbytes].data)
        found.append(derivation.find(one, spec, print_))

    waiting = threading.Thread(target=look)
    waiting.start()
    for one in chunks[1::-1]:
        assert not found
        assert waiting.is_alive()
        derivation.take(one, [master[one.start : one.start + one.nbytes]], arena)
    waiting.join(30)
    assert found == [Derived(1, 0, 2 * CHUNK)]


def test_what_waits_goes_on_when_a_save_ends():
    derivation, spec, chunks = new_derivation()
    found: list[object] = []
    waiting = threading.Thread(target=lambda: found.append(derivation.find(chunks[3], spec, "")))
    waiting.start()
    with derivation.ended():
        pass
    waiting.join(30)
    assert found == [None]


def filled_chunk(start: int, nbytes: int, known: str = "1" * 32) -> ChunkEntry:
    extent = Extent(segment_name(1, "01234567", 0, 0), 64 + start, nbytes)
    return ChunkEntry(start, nbytes, extent, known, "0" * 16, (Plane("raw", nbytes),))


def test_what_a_restore_has_put_into_host_memory_is_rounded_from_there():
    master, filled, out = numbers(1, 1000), Filled(()), np.empty(2000, np.uint8)
    target = tensor_of(master)
    sources = filled_chunk(0, 2400), filled_chunk(2400, 1600)
    copy = replace(filled_chunk(0, 2000), planes=(), sources=sources)
    assert not filled.round("float16", copy, out)
    filled.add([target], sources[1].start, sources[1])
    assert not filled.round("float16", copy, out)
    filled.add([tensor_of(master[::-1]), target], 0, sources[0])
    assert filled.round("float16", copy, out)
    assert out.tobytes() == master.astype(np.float16).tobytes()
    changed = replace(copy, sources=(filled_chunk(0, 2400, "2" * 32), sources[1]))
    assert not filled.round("float16", changed, out)
    assert not filled.round("float16", sources[0], out)


def test_only_whole_rows_of_float32_in_host_memory_are_relied_on():
    out = np.empty(2000, np.uint8)
    for array in (numbers(1, 1000)[::-1], numbers(1, 1000).astype(np.float64)):
        filled, source = Filled(()), filled_chunk(0, 4000)
        filled.add([tensor_of(array)], 0, source)
        assert not filled.round("float16", replace(source, sources=(source,)), out)


def test_a_master_that_shares_its_memory_is_not_relied_on():
    """What its copy is made of may be somebody else's bytes by then."""
    store, count = MemoryStore(), 1_000_000
    one, other = numbers(1, count), numbers(2, count // 2)
    state = {"a": one, "b": other, "copy": one.astype(np.float16)}
    with checkpoints(store, memory="64 MiB") as ckpt:
        assert save(ckpt, 1, state).derived_nbytes == 2 * count
        room = np.zeros(count, np.float32)
        target = {"a": room, "b": room[count // 2 :], "copy": np.zeros(count, np.float16)}
        with pytest.raises(gpuckpt.MismatchError, match="shares memory"):
            ckpt.restore(target)


def manifest_of_a_copy() -> bytes:
    """Eight float16 in a chunk, that are the rounding of two chunks; one of these has a base."""
    extents = [Extent(segment_name(at, "01234567", 0, 0), 64, 16) for at in (1, 2, 3)]
    known = ("0" * 32, "1" * 16)
    base = ChunkEntry(0, 16, extents[2], *known, (Plane("raw", 16),))
    first = ChunkEntry(0, 16, extents[1], *known, (Plane("raw", 4),) * 4, base)
    second = ChunkEntry(16, 16, extents[0], *known, (Plane("raw", 16),))
    empty = Extent(extents[1].segment, 64, 0)
    copy = ChunkEntry(0, 16, empty, *known, (), sources=(first, second))
    tensor = TensorEntry(Spec("a", "float16", (8,)), (copy,), 3)
    return pack_manifest(Manifest(3, {"dict": [["a", {"tensor": 0}]]}, (tensor,)))


SOURCES = 9  # their place in a chunk's row
Row = list[Any]


def with_sources(row: Row, *sources: Any) -> Row:
    return [*row[:SOURCES], [*sources]]


def with_first(row: Row, at: int, value: object) -> Row:
    """The row with something else in its first source's."""
    first, *others = row[SOURCES]
    return with_sources(row, [*first[:at], value, *first[at + 1 :]], *others)


HOSTILE: dict[str, Callable[[Row], Row]] = {
    "no sources": with_sources,
    "sources of another kind": lambda row: [*row[:SOURCES], {"a": 1}],
    "no list": lambda row: [*row[:SOURCES], 3],
    "too few": lambda row: with_sources(row, row[SOURCES][0]),
    "too many": lambda row: with_sources(row, *row[SOURCES], row[SOURCES][1]),
    "another order": lambda row: with_sources(row, *row[SOURCES][::-1]),
    "the same twice": lambda row: with_sources(row, row[SOURCES][0], row[SOURCES][0]),
    "a source of its own": lambda row: with_sources(row, row, row[SOURCES][1]),
    "a source with sources": lambda row: with_sources(
        row, [*row[SOURCES][0][:8], None, row[SOURCES]], row[SOURCES][1]
    ),
    "an empty source": lambda row: with_sources(
        row, [0, 0, 0, 64, 0, *row[5:7], [["raw", 0]]], *row[SOURCES]
    ),
    "a source that cuts an element": lambda row: with_first(row, 1, 14),
    "a source of 2^62 bytes": lambda row: with_first(row, 1, 2**62),
    "a source of another place": lambda row: with_first(row, 0, 4),
    "a source in a segment that isn't listed": lambda row: with_first(row, 2, 3),
    "planes that don't fill a source": lambda row: with_first(row, 4, 15),
    "a source of two planes": lambda row: with_first(row, 7, [["raw", 8]] * 2),
    "a base too": lambda row: [*row[:8], row[SOURCES][1], row[SOURCES]],
    "bytes of its own": lambda row: [*row[:4], 16, *row[5:7], [["raw", 16]], *row[8:]],
    "an extent without planes": lambda row: [*row[:4], 16, *row[5:]],
    "planes without an extent": lambda row: [*row[:7], [["zstd", 0]], *row[8:]],
    "more after it": lambda row: [*row, []],
    "a length that is odd": lambda row: [0, 15, *row[2:]],
    "a length that isn't its sources'": lambda row: [0, 8, *row[2:]],
    "65 bases of a source": lambda row: with_first(row, 8, with_bases(row[SOURCES][0][8], 65)),
}


def with_bases(base: Row, count: int) -> Row:
    """A row without a base, with so many of them."""
    found = base
    for _ in range(count):
        found = [*base[:4], 16, *base[5:7], [["raw", 4]] * 4, found]
    return found


def test_chunks_with_sources_are_unpacked_as_they_were_packed():
    packed = manifest_of_a_copy()
    manifest = unpack_manifest(packed, "m")
    (chunk,) = manifest.tensors[0].chunks
    assert pack_manifest(manifest) == packed
    assert body_of(packed)["requires"] == ["delta", "derived"]
    assert len(manifest.segments) == 3
    assert (len(chunk.sources), manifest.encoded_nbytes) == (2, 0)


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_strangers_derived_chunk_is_refused(change):
    body = body_of(manifest_of_a_copy())
    (row,) = body["tensors"][0]["chunks"]
    for changed in (row, change(row)):
        body["tensors"][0]["chunks"] = [changed]
        index = {"requires": ["delta", "derived"], "bases": body["segments"][1:], "step": 3}
        index["tensors"] = [{**body["tensors"][0], "chunks": [[*changed[:2], 0, *changed[3:]]]}]
        if changed is row:
            unpack_manifest(resealed(body), "m")
            read_strangers_index(index)
            continue
        with pytest.raises((gpuckpt.CorruptError, gpuckpt.FormatError)):
            unpack_manifest(resealed(body), "m")
        with pytest.raises((gpuckpt.CorruptError, gpuckpt.FormatError)):
            read_strangers_index(index)


@pytest.mark.parametrize("dtype", ["float32", "int16", ">f2", "float8_e5m2", "complex64"])
def test_what_nothing_is_rounded_to_has_no_sources(dtype):
    body = body_of(manifest_of_a_copy())
    itemsize = {"float32": 4, "complex64": 8, "float8_e5m2": 1}.get(dtype, 2)
    body["tensors"][0] |= {"dtype": dtype, "shape": [16 // itemsize]}
    with pytest.raises((gpuckpt.CorruptError, gpuckpt.FormatError)):
        unpack_manifest(resealed(body), "m")


def fail(item: int) -> float:
    return item / 0


def test_a_worker_that_fails_lets_those_go_on_who_wait_for_what_it_had():
    derivation, spec, chunks = new_derivation()
    found: list[object] = []
    waiting = threading.Thread(target=lambda: found.append(derivation.find(chunks[3], spec, "")))
    waiting.start()
    with pytest.raises(ZeroDivisionError):
        derivation.guarded(fail)(1)
    waiting.join(30)
    assert found == [None]
    assert derivation.guarded(str)(1) == "1"


def test_a_segment_isnt_kept_for_a_master_that_is_counted_twice():
    """Of the first segment less than half is in use, though a copy refers to it too."""
    store, master = MemoryStore(), numbers(1)
    state = {"copy": master.astype(np.float16), "master": master, "other": numbers(2, 120_000)}
    with checkpoints(store, codec="raw") as ckpt:
        save(ckpt, 1, state)
        state["other"] += np.float32(1)
        save(ckpt, 2, state)
        assert save(ckpt, 3, state).written_nbytes == master.nbytes
    assert {segment_step(name) for name in open_step(store).segments} == {2, 3}
    assert is_right(store, 3, state)


KEEPS = [None, gpuckpt.Keep(last=1), gpuckpt.Keep(every=2)]
PAIRS = 4


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sets(st.integers(0, PAIRS - 1), max_size=PAIRS),
            st.sets(st.integers(0, PAIRS - 1), max_size=PAIRS),
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(KEEPS),
    st.sampled_from(["copy", "hold"]),
    st.sampled_from(["auto", "raw", "delta"]),
    st.sampled_from(["8 MiB", "900 KiB"]),
)
def test_every_checkpoint_is_whole_whatever_masters_and_copies_do(
    changes, keep, snapshot, codec, memory
):
    """Of each pair, a master may move alone, or with its copy."""
    store, states = MemoryStore(), {}
    state = {f"w{at}": numbers(at, 30_000 * at + 4096) for at in range(PAIRS)}
    for at in range(PAIRS):
        kind = np.float16 if at % 2 else ml_dtypes.bfloat16
        state[f"half{at}"] = state[f"w{at}"].astype(kind)
    if snapshot == "copy":
        memory = "8 MiB"
    options = {"keep": keep, "snapshot": snapshot, "codec": codec, "memory": memory}
    with checkpoints(store, **options) as ckpt:
        for step, (moved, followed) in enumerate(changes, 1):
            with ckpt.update():
                for at in moved:
                    state[f"w{at}"][:: step * 100] += np.float32(1e-3)
                for at in followed:
                    copy = state[f"half{at}"]
                    copy[...] = state[f"w{at}"].astype(copy.dtype)
            save(ckpt, step, state)
            states[step] = {name: array.copy() for name, array in state.items()}
        kept = ckpt.steps()
    named = {name for step in kept for name in open_step(store, step).segments}
    assert {name for name in store.names() if segment_step(name) is not None} == named
    assert all(is_right(store, step, states[step]) for step in kept)
