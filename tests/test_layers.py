"""Every layer has two functions that undo each other."""

from __future__ import annotations

import itertools
import json
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpuckpt import layout, segments
from gpuckpt.arena import AREAS, Arena
from gpuckpt.arrays import Tensor, gather, host_view, look, scatter
from gpuckpt.census import take_inventory
from gpuckpt.coding import Encoded, decode, encode
from gpuckpt.devices import Device, Devices, Piece
from gpuckpt.dtypes import is_turned, name_of, to_numpy, width_of
from gpuckpt.errors import (
    CheckpointError,
    CorruptError,
    FormatError,
    InvalidError,
)
from gpuckpt.fingerprint import checksum, checksum128, fingerprint
from gpuckpt.inventory import Inventory, Snapshot
from gpuckpt.manifest import Manifest, pack_manifest, unpack_manifest
from gpuckpt.names import names_of
from gpuckpt.ordered import alternated, ordered_map
from gpuckpt.plan import area_nbytes, plan_chunks
from gpuckpt.planes import join, split
from gpuckpt.save import CODECS
from gpuckpt.sizes import format_nbytes, parse_nbytes, parse_seconds
from gpuckpt.snapshot import Planner, capture, place
from gpuckpt.spec import Chunk, ChunkEntry, Extent, Plane, Spec
from gpuckpt.staging import Reread, Staged, stage, upload
from gpuckpt.stores import Store, read_all
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.memory import MemoryStore
from gpuckpt.structure import Mark, from_json, walk_json
from gpuckpt.tensors import TensorEntry
from gpuckpt.tree import flatten, rebuild
from gpuckpt.values import NotPlainError, decode_value, encode_value
from tests.stores_contract import small_manifest
from tests.strategies import (
    FIXED,
    PLAIN,
    SMALL,
    TIME,
    Array,
    arrays,
    dtypes,
    keys,
    plain_values,
    same,
    states,
)

CHUNK = 1 << 16


def bytes_of(array: Array) -> Array:
    return np.frombuffer(array.tobytes(), np.uint8)


def tensor_of(array: Array) -> Tensor:
    tensor = look(array, "a")
    assert tensor is not None
    return tensor


def new_arena(chunk_nbytes: int = CHUNK, count: int = 2) -> Arena:
    return Arena(np.empty(AREAS * count * area_nbytes(chunk_nbytes), np.uint8), chunk_nbytes)


def arrays_of(inventory: Inventory) -> list[Array]:
    """Its tensors, seen where they lie."""
    rows = zip(inventory.addresses.tolist(), inventory.specs, inventory.roster.strides, strict=True)
    return [host_view(*row) for row in rows]


# Values


@given(plain_values())
@example("\ud800\udc00")
@example(np.bytes_(b"ends in zeros\0\0"))
@example(np.datetime64("NaT"))
@example(2**20000)
def test_a_plain_value_goes_through_json_unchanged(value):
    data = json.loads(json.dumps(encode_value(value), allow_nan=False))
    assert same(decode_value(data), value)


@given(keys())
def test_a_key_goes_through_json_unchanged_and_still_finds_its_value(key):
    again = decode_value(json.loads(json.dumps(encode_value(key), allow_nan=False)))
    assert same(again, key)
    assert again in {key: None}


@pytest.mark.parametrize(
    "value", [{1}, object(), range(3), np.ma.masked, len, type("S", (str,), {})("x")]
)
def test_what_could_not_come_back_as_itself_is_no_plain_value(value):
    with pytest.raises(NotPlainError):
        encode_value(value)


_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ("int", "float", "complex", "bytes", "bytearray", "scalar", "tuple", "str", "x")
            ),
            inner,
            max_size=2,
        ),
    ),
    max_leaves=6,
)


@given(_JSON)
def test_json_that_is_no_plain_value_is_a_format_error_and_nothing_else(data):
    try:
        decode_value(data)
    except CheckpointError as error:
        assert isinstance(error, FormatError)  # noqa: PT017


def test_values_nested_without_end_are_a_format_error():
    data: object = 1
    for _ in range(5000):
        data = {"tuple": [data]}
    with pytest.raises(FormatError):
        decode_value(data)
    while isinstance(data, dict):  # taken apart step by step, as deep as it is
        data = data["tuple"].pop()


# The tree


@settings(max_examples=60, deadline=None)
@given(states())
def test_a_state_is_rebuilt_from_its_structure_and_its_leaves(state):
    flat = flatten(state)
    leaves = [leaf.leaf for leaf in flat.leaves]
    for number, leaf in enumerate(flat.leaves):
        leaf.node["tensor"] = number
    structure = json.loads(json.dumps(flat.structure))

    def fill(node: Any) -> Any:
        if isinstance(node, Mark):
            return leaves[node.tensor]
        if isinstance(node, dict):
            return {key: fill(child) for key, child in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(fill(child) for child in node)
        return node

    assert same(fill(from_json(structure)), state)


@settings(max_examples=60, deadline=None)
@given(states())
def test_rebuilding_with_nothing_new_changes_nothing(state):
    flat = flatten(state)
    before = [id(leaf.leaf) for leaf in flat.leaves]
    assert rebuild(state, lambda _, node: node, flat.opened) is state
    assert [id(leaf.leaf) for leaf in flatten(state).leaves] == before


@settings(max_examples=60, deadline=None)
@given(states())
def test_names_are_unique_and_depend_on_the_structure_alone(state):
    flat = flatten(state)
    assert len(set(flat.names)) == len(flat.leaves)
    for leaf in flat.leaves:
        leaf.node["value"] = None
    stored = list(walk_json(json.loads(json.dumps(flat.structure))))
    assert names_of([path for path, _ in stored]) == flat.names


def test_names_are_the_keys_with_dots_between_them_and_exact_only_where_two_would_be_the_same():
    state = {"a.b": 1, "a": {"b": 2, "c": [3, (4,)]}, 0: 5, "0": 6, None: 7, (1, "x"): 8}
    assert flatten(state).names == [
        *('["a.b"]', '["a"]["b"]', "a.c.0", "a.c.1.0"),
        *("[0]", '["0"]', "null", '{"tuple":[1,"x"]}'),
    ]


def test_keys_that_are_written_alike_still_get_names_of_their_own():
    state = {float("nan"): 1, float("nan"): 2, "nan": 3}
    assert len(set(flatten(state).names)) == 3


def test_a_structure_with_a_key_twice_is_refused():
    leaf = {"value": 1}
    for keys_ in (["a", "a"], [1, True], [{"bytearray": "YQ=="}]):
        structure = {"dict": [[key, leaf] for key in keys_]}
        with pytest.raises(FormatError):
            from_json(structure)
        with pytest.raises(FormatError):
            list(walk_json(structure))


# Element types


@pytest.mark.parametrize("name", [*PLAIN, *SMALL, *TIME, *FIXED])
def test_an_element_type_is_found_again_by_its_name(name):
    dtype = to_numpy(name)
    assert name_of(dtype) == name
    assert to_numpy(name).itemsize % width_of(name) == 0
    swapped = dtype.newbyteorder(">")
    again = to_numpy(str(name_of(swapped)))
    assert same(np.zeros(1, again), np.zeros(1, swapped))
    assert again.type is dtype.type


@given(dtypes())
def test_every_element_type_has_a_name_that_leads_back_to_it(dtype):
    name = name_of(dtype)
    assert name is not None
    assert same(np.zeros(2, to_numpy(name)), np.zeros(2, dtype))


@pytest.mark.parametrize(
    "dtype",
    ["O", "f4,i4", "(2,)f4", [("x", "u1")], "S100000", "V70000", np.dtypes.StringDType(), ">m8"],
)
def test_elements_that_are_not_bytes_of_their_own_have_no_name(dtype):
    assert name_of(np.dtype(dtype)) is None


@given(
    st.one_of(
        st.text(max_size=12),
        st.from_regex(r">?(datetime64|timedelta64|S|U|V)(\[?\d*[a-zA-Z]*\]?)", fullmatch=True),
    )
)
@example("S999999999")
@example("object")
@example("O")
@example("float32,int8")
def test_an_unknown_element_type_is_a_format_error(name):
    try:
        assert to_numpy(name).itemsize <= 1 << 16
    except FormatError:
        assert name not in PLAIN


# Planes and coding


@given(arrays())
def test_planes_are_split_and_joined_again(array):
    raw, width = bytes_of(array), width_of(str(name_of(array.dtype)))
    planes = split(raw, width, np.empty(raw.size + 7, np.uint8))
    assert len(planes) == width
    for k, plane in enumerate(planes):
        assert np.array_equal(plane, raw[k::width])
    out = np.empty_like(raw)
    join(planes, out)
    assert np.array_equal(out, raw)


@settings(deadline=None)
@given(
    arrays(shape=st.sampled_from([(1,), (7,), (300,), (20, 20)])), st.sampled_from(sorted(CODECS))
)
def test_an_encoded_chunk_is_decoded_again_and_never_larger(array, codec):
    check_coding(bytes_of(array), str(name_of(array.dtype)), codec)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float64", "float16", "complex64", "uint8"]
)
def test_weights_are_encoded_and_decoded_again(codec, dtype):
    rng = np.random.default_rng(1)
    count = 60_000 // to_numpy(dtype).itemsize
    raw = bytes_of((rng.standard_normal(count) * 0.02).astype(to_numpy(dtype)))
    length = check_coding(raw, dtype, codec)
    if codec != "raw" and dtype in ("float32", "bfloat16"):
        assert length < 0.92 * raw.size


def check_coding(raw: Array, dtype: str, codec: str) -> int:
    turned = is_turned(dtype)
    encoded = encode([raw], width_of(dtype), new_arena().take(), CODECS[codec], turned=turned)
    assert encoded.turned == (turned and len(encoded.planes) > 1)
    coded = np.frombuffer(b"".join(encoded.parts), np.uint8)
    assert [part.nbytes for part in encoded.parts] == [plane.length for plane in encoded.planes]
    assert coded.size <= raw.size
    if codec == "raw":
        assert np.array_equal(coded, raw)
    assert_decoded(coded, encoded, raw)
    return coded.size


def assert_decoded(coded: Array, encoded: Encoded, raw: Array) -> None:
    """Into one room for all, and into a room for each plane."""
    out, noted, turned = np.full_like(raw, 0xAA), bytearray(), encoded.turned
    slot = new_arena().take()
    decode(coded, encoded.planes, slot, [out], "here", turned=turned, note=noted.extend)
    assert np.array_equal(out, raw)
    assert noted == raw.tobytes()
    width = len(encoded.planes)
    planes = split(raw, width, np.empty_like(raw), turned=turned)
    rooms = [np.full(raw.size // width, 0xAA, np.uint8) for _ in range(width)]
    decode(coded, encoded.planes, new_arena().take(), rooms, "here")
    assert all(map(np.array_equal, rooms, planes))


@settings(deadline=None)
@given(
    arrays(shape=st.sampled_from([(0,), (1,), (7,), (300,), (20, 20), (700,)])),
    st.sampled_from(sorted(CODECS)),
)
def test_a_chunk_is_encoded_to_the_same_bytes_from_its_planes_as_from_raw(array, codec):
    dtype = str(name_of(array.dtype))
    raw, width, turned = bytes_of(array), width_of(dtype), is_turned(dtype)
    planes = [plane.copy() for plane in split(raw, width, np.empty_like(raw), turned=turned)]
    one = encode([raw], width, new_arena().take(), CODECS[codec], turned=turned)
    other = encode(planes, width, new_arena().take(), CODECS[codec], turned=turned)
    assert (one.planes, one.turned) == (other.planes, other.turned)
    assert [bytes(part) for part in one.parts] == [bytes(part) for part in other.parts]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "uint8"])
def test_weights_that_lie_in_a_slots_planes_are_encoded_without_harm_to_them(codec, dtype):
    rng = np.random.default_rng(1)
    raw = bytes_of((rng.standard_normal(4096) * 0.02).astype(to_numpy(dtype)))
    width, slot, turned = width_of(dtype), new_arena().take(), is_turned(dtype)
    planes = split(raw, width, slot.planes, turned=turned)
    before = [plane.copy() for plane in planes]
    encoded = encode(planes, width, slot, CODECS[codec], turned=turned)
    again = encode([raw], width, new_arena().take(), CODECS[codec], turned=turned)
    assert encoded.planes == again.planes
    assert [bytes(part) for part in encoded.parts] == [bytes(part) for part in again.parts]
    assert all(map(np.array_equal, planes, before))


def test_turned_planes_that_do_not_pay_become_the_chunk_as_it_is():
    """As they come from a device that has turned them already."""
    raw = np.random.default_rng(1).integers(0, 256, 1 << 16, np.uint8)
    planes = split(raw, 4, np.empty_like(raw), turned=True)
    encoded = encode(planes, 4, new_arena().take(), CODECS["zstd"], turned=True)
    assert encoded.planes == (Plane("raw", raw.size),)
    assert not encoded.turned
    assert bytes(encoded.parts[0]) == raw.tobytes()


@settings(deadline=None)
@given(st.data())
def test_a_damaged_frame_is_corrupt_and_no_other_error(data):
    raw = bytes_of(np.arange(2000, dtype=np.int32))
    slot = new_arena().take()
    encoded = encode([raw], 4, slot, CODECS["zstd"])
    coded = np.frombuffer(b"".join(encoded.parts), np.uint8).copy()
    at = data.draw(st.integers(0, coded.size - 1))
    coded[at] ^= data.draw(st.integers(1, 255))
    rooms = list(np.empty((data.draw(st.sampled_from((1, 4))), raw.size), np.uint8))
    if len(rooms) == 4:
        rooms = [room[: raw.size // 4] for room in rooms]
    try:
        decode(coded, encoded.planes, slot, rooms, "here")
    except CorruptError as error:
        assert "here" in str(error)  # noqa: PT017


@given(st.binary(max_size=3000), st.data())
def test_check_values_tell_any_two_strings_apart_that_differ_in_a_bit_or_in_length(data, draws):
    raw = np.frombuffer(data, np.uint8)
    assert fingerprint(raw.data) == fingerprint(raw.copy().data)
    cut = draws.draw(st.integers(0, len(data)))
    assert checksum([data[:cut], data[cut:]]) == checksum([data])
    longer = data + b"\0"
    assert fingerprint(memoryview(longer)) != fingerprint(raw.data)
    if data:
        other = raw.copy()
        other[draws.draw(st.integers(0, len(data) - 1))] ^= 1 << draws.draw(st.integers(0, 7))
        assert fingerprint(other.data) != fingerprint(raw.data)
        assert checksum([other.data]) != checksum([data])
        assert checksum128(other.tobytes()) != checksum128(data)


# Runs of bytes of arrays in any order


@given(arrays(), st.data())
def test_gathered_bytes_are_those_of_c_order(array, data):
    raw, itemsize = bytes_of(array), array.itemsize
    first = data.draw(st.integers(0, array.size))
    count = data.draw(st.integers(0, array.size - first))
    out = np.full(count * itemsize, 0xAA, np.uint8)
    gather(tensor_of(array).array, first * itemsize, out)
    assert np.array_equal(out, raw[first * itemsize : (first + count) * itemsize])


@given(arrays(), st.data())
def test_scattered_bytes_arrive_where_they_were_gathered_and_nowhere_else(array, data):
    target = np.zeros_like(array)
    if data.draw(st.booleans()):
        target = np.zeros(array.shape[::-1], array.dtype).T
    raw, itemsize = bytes_of(array), array.itemsize
    first = data.draw(st.integers(0, array.size))
    count = data.draw(st.integers(0, array.size - first))
    part = slice(first * itemsize, (first + count) * itemsize)
    scatter(raw[part], target, part.start)
    wanted = np.zeros_like(raw)
    wanted[part] = raw[part]
    assert np.array_equal(bytes_of(target), wanted)


# Staging, capture and place


def snapshot_of(state: object, devices: Devices, mode: str, chunk_nbytes: int = CHUNK) -> Snapshot:
    inventory = take_inventory(state)
    plans = Planner(chunk_nbytes).plans(inventory.roster)
    return capture(inventory, plans, devices, mode=mode, host_room_nbytes=1 << 30)


def raw_chunks(staged: Staged) -> list[Array]:
    """What has arrived from the host: chunks in one piece each."""
    return [raw for arrived in staged.transfer.wait() for (raw,) in [arrived.planes]]


def put_back(staged: Staged, targets: list[Tensor], device: Device, arena: Arena) -> None:
    """Upload what was staged, by way of another slot."""
    slot = arena.take()
    pieces = [Piece(c.nbytes, 1, c.start, (targets[c.tensor],)) for c in staged.chunks]
    uploading, raws = upload(pieces, device, slot), raw_chunks(staged)
    for raw, (room,) in zip(raws, uploading.rooms, strict=True):
        room[:] = raw
    assert uploading.start().wait() == [[fingerprint(raw.data)] for raw in raws]
    arena.give(slot)


@settings(max_examples=50, deadline=None)
@given(st.lists(arrays(), max_size=4), st.sampled_from(("copy", "hold")), st.integers(64, 300))
def test_what_is_staged_can_be_uploaded_again_chunk_by_chunk(originals, mode, chunk_nbytes):
    devices, arena = Devices(), new_arena(chunk_nbytes)
    snapshot = snapshot_of(originals, devices, mode, chunk_nbytes)
    given_ = arrays_of(take_inventory(originals))
    targets = [tensor_of(np.zeros_like(array)) for array in given_]
    seen: dict[type, list[Chunk]] = {Staged: [], Reread: []}
    for staged in stage(snapshot, arena):
        seen[type(staged)] += staged.chunks
        if isinstance(staged, Staged):
            put_back(staged, targets, devices["cpu"], arena)
        else:
            runs = [bytes_of(targets[c.tensor].array)[c.start :][: c.nbytes] for c in staged.chunks]
            assert staged.transfer.wait() == [fingerprint(run.data) for run in runs]
        arena.give(staged.slot)
    every = list(plan_chunks(snapshot.inventory.specs, chunk_nbytes=chunk_nbytes))
    assert seen == {Staged: every, Reread: every if mode == "hold" else []}
    assert all(same(one.array, other) for one, other in zip(targets, given_, strict=True))
    snapshot.release()
    assert snapshot.staged.is_set()


def test_a_copy_is_the_state_at_its_moment_whatever_is_done_to_it_afterwards():
    state = {"w": np.arange(1000.0), "t": np.arange(12).reshape(3, 4).T}
    wanted = {name: array.copy() for name, array in state.items()}
    arena = new_arena()
    snapshot = snapshot_of(state, Devices(), "copy")
    for array in state.values():
        array[...] = 0
    seen = []
    for staged in stage(snapshot, arena):
        assert isinstance(staged, Staged), "a copy isn't read again"
        for chunk, raw in zip(staged.chunks, raw_chunks(staged), strict=True):
            seen.append(snapshot.inventory.specs[chunk.tensor].name)
            assert raw.tobytes() == wanted[seen[-1]].tobytes()
        arena.give(staged.slot)
    assert seen == ["w", "t"]


def test_what_is_held_is_looked_at_once_more_after_it_was_read():
    state = {"w": np.arange(1000.0), "t": np.arange(12).reshape(3, 4).T}
    arena = new_arena()
    snapshot = snapshot_of(state, Devices(), "hold")
    line = stage(snapshot, arena)
    first = next(line)
    assert isinstance(first, Staged)
    before = [fingerprint(raw.data) for raw in raw_chunks(first)]
    arena.give(first.slot)
    state["t"][1, 1] += 1
    (second,) = line
    assert isinstance(second, Reread)
    assert second.chunks == first.chunks
    assert [one == other for one, other in zip(second.transfer.wait(), before, strict=True)] == [
        True,
        False,
    ]


def test_a_copy_that_has_no_room_is_refused_and_auto_then_holds():
    inventory = take_inventory({"w": np.zeros(1000)})
    plans = Planner(CHUNK).plans(inventory.roster)
    with pytest.raises(InvalidError, match="snapshot"):
        capture(inventory, plans, Devices(), mode="copy", host_room_nbytes=7999)
    for room, mode in ((7999, "hold"), (1 << 20, "copy")):
        snapshot = capture(inventory, plans, Devices(), mode="auto", host_room_nbytes=room)
        assert snapshot.mode == mode
        snapshot.release()


@settings(max_examples=50, deadline=None)
@given(states())
def test_leaves_that_are_placed_are_captured_again(state):
    flat = flatten(state)
    new = {leaf.path: number for number, leaf in enumerate(flat.leaves)}
    assert place(state, flat, new, {}) is state
    assert [leaf.leaf for leaf in flatten(state).leaves] == _last_written(state, list(new.values()))


def _last_written(state: object, values: list[int]) -> list[int]:
    """One container in two places has what was put there last."""
    found = [leaf.leaf for leaf in flatten(state).leaves]
    assert set(found) <= set(values)
    assert len(found) == len(values)
    return found


# Segments


def entries_for(state: dict, writer: segments.Writer, chunk_nbytes: int) -> list[TensorEntry]:
    inventory = take_inventory(state)
    tensors = arrays_of(inventory)
    rows: list[list[ChunkEntry]] = [[] for _ in tensors]
    for chunk in plan_chunks(inventory.specs, chunk_nbytes=chunk_nbytes):
        raw = np.empty(chunk.nbytes, np.uint8)
        gather(tensors[chunk.tensor], chunk.start, raw)
        cut = chunk.nbytes // 2
        (extent,) = writer.write([[raw[:cut].data, raw[cut:].data]])
        planes = (Plane("raw", chunk.nbytes),)
        values = (fingerprint(raw.data), checksum([raw.data]))
        rows[chunk.tensor].append(ChunkEntry(chunk.start, chunk.nbytes, extent, *values, planes))
    return [
        TensorEntry(spec, tuple(row), 7) for spec, row in zip(inventory.specs, rows, strict=True)
    ]


def new_writer(store: Store, segment_nbytes: int) -> segments.Writer:
    return segments.Writer(
        store,
        lambda part: layout.segment_name(7, "0a0b0c0d", 0, part),
        segment_nbytes=segment_nbytes,
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(arrays(), max_size=4), st.integers(64, 200), st.integers(100, 4000))
def test_what_was_written_to_segments_is_read_with_their_own_index_alone(
    originals, chunk_nbytes, segment_nbytes
):
    store = MemoryStore()
    writer = new_writer(store, segment_nbytes)
    written = entries_for(dict(enumerate(originals)), writer, chunk_nbytes)
    writer.finish(written, 7)
    found: dict[str, dict[int, bytes]] = {entry.spec.name: {} for entry in written}
    for name in writer.names:
        step, tensors = segments.read_index(store, name)
        assert step == 7
        for entry in tensors:
            for chunk in entry.chunks:
                room = np.empty(chunk.extent.length, np.uint8)
                with segments.open_segment(store, name) as reader:
                    read = b"".join(map(bytes, reader.read(chunk.extent, room)))
                assert read == room.tobytes()
                assert chunk.extent.segment == name
                found[entry.spec.name][chunk.start] = bytes(room)
    every = arrays_of(take_inventory(dict(enumerate(originals))))
    for entry, array in zip(written, every, strict=True):
        parts = found[entry.spec.name]
        whole = b"".join(parts[start] for start in sorted(parts))
        assert whole == array.tobytes()


def one_segment() -> tuple[MemoryStore, str]:
    store = MemoryStore()
    writer = new_writer(store, 1 << 20)
    writer.finish(entries_for({"a": np.arange(50), "b": np.zeros((3, 3), "f2")}, writer, 64), 7)
    return store, writer.names[0]


def test_damage_to_a_segments_header_index_or_trailer_is_found():
    store, name = one_segment()
    whole = bytes(store.files[name])
    trailer = layout.unpack_trailer(whole[-layout.TRAILER.size :], name)
    places = [*range(12), *range(trailer.offset, len(whole))]
    padding = range(len(whole) - 20, len(whole) - 8)  # reserved bytes of the trailer
    for at in places:
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        if at in padding:
            continue
        with pytest.raises(CheckpointError):
            segments.read_index(MemoryStore({name: bytes(damaged)}), name)


def test_a_truncated_segment_has_no_index():
    store, name = one_segment()
    whole = bytes(store.files[name])
    for length in range(len(whole)):
        with pytest.raises(CheckpointError):
            segments.read_index(MemoryStore({name: whole[:length]}), name)


def test_an_abandoned_writer_leaves_nothing(tmp_path: Path):
    store = LocalStore(tmp_path)
    writer = new_writer(store, 100)
    for _ in range(3):
        writer.write([[memoryview(bytes(90))]])
    assert len(store.names()) == 3
    writer.abandon()
    assert store.names() == []


# The layout


@given(st.integers(0, layout.STEP_LIMIT - 1), st.integers(0, 999_999), st.integers(0, 999_999))
def test_names_of_files_lead_back_to_their_step(step, rank, part):
    manifest = layout.manifest_name(step)
    segment = layout.segment_name(step, "89abcdef", rank, part)
    assert (layout.manifest_step(manifest), layout.segment_step(segment)) == (step, step)
    assert layout.manifest_step(segment) is None
    assert layout.segment_step(manifest) is None
    assert layout.manifest_step(manifest + layout.TEMPORARY) is None


@given(st.integers(0, layout.STEP_LIMIT - 1), st.integers(0, layout.STEP_LIMIT - 1))
def test_names_of_files_sort_as_their_steps_do(one, other):
    assert (one < other) == (layout.manifest_name(one) < layout.manifest_name(other))


@pytest.mark.parametrize("step", [-1, layout.STEP_LIMIT, True, 1.0, "1", None])
def test_what_is_no_step_is_refused(step):
    with pytest.raises(InvalidError):
        layout.check_step(step)


_U64 = st.integers(0, 2**64 - 1)


@given(_U64, _U64, _U64, st.binary(min_size=16, max_size=16))
def test_a_trailer_is_read_as_it_was_packed(offset, length, raw_length, digest):
    trailer = layout.SegmentTrailer(offset, length, raw_length, digest)
    packed = layout.pack_trailer(trailer)
    assert layout.unpack_trailer(packed, "f") == trailer
    with pytest.raises(CorruptError):
        layout.unpack_trailer(packed[:-1], "f")
    newer = packed[:40] + b"\x02" + packed[41:]
    with pytest.raises(FormatError):
        layout.unpack_trailer(newer, "f")


def test_a_header_of_another_format_is_refused():
    layout.check_header(layout.pack_header(), "f")
    for damaged in (b"", b"PK" + layout.pack_header()[2:], layout.pack_header()[:8] + b"\x02" * 56):
        with pytest.raises(FormatError):
            layout.check_header(damaged, "f")


# The manifest


_INDEXES = st.integers(0, 2**40)


@st.composite
def manifests(draw: st.DrawFn, state: object = None) -> Manifest:
    state = draw(states()) if state is None else state
    store = MemoryStore()
    inventory = take_inventory(state)
    writer = new_writer(store, draw(st.integers(100, 3000)))
    rows: list[list[ChunkEntry]] = [[] for _ in inventory.specs]
    for chunk in plan_chunks(inventory.specs, chunk_nbytes=128):
        (extent,) = writer.write([[memoryview(bytes(chunk.nbytes))]])
        planes = (Plane("raw", chunk.nbytes),)
        rows[chunk.tensor].append(
            ChunkEntry(chunk.start, chunk.nbytes, extent, "0" * 32, "1" * 16, planes)
        )
    number = st.one_of(st.floats(allow_nan=False), st.integers(-5, 5).map(float))
    return Manifest(
        step=draw(st.integers(0, layout.STEP_LIMIT - 1)),
        structure=inventory.structure,
        tensors=tuple(
            TensorEntry(spec, tuple(row), draw(_INDEXES))
            for spec, row in zip(inventory.specs, rows, strict=True)
        ),
        epoch=draw(st.none() | st.integers(-1, 9)),
        metrics=draw(st.dictionaries(st.text(max_size=4), number, max_size=2)),
        created=draw(st.floats(0, 1e10)),
        writer=draw(st.text(max_size=9)),
    )


@settings(max_examples=40, deadline=None)
@given(manifests())
def test_a_manifest_is_unpacked_as_it_was_packed(manifest):
    again = unpack_manifest(pack_manifest(manifest), "m")
    assert again.structure == json.loads(json.dumps(manifest.structure))
    assert again.tensors == manifest.tensors or "\\ud" in repr(manifest.tensors)
    assert (again.step, again.epoch, again.metrics) == (
        *(manifest.step, manifest.epoch),
        manifest.metrics,
    )
    assert (again.created, again.writer) == (manifest.created, manifest.writer)
    assert pack_manifest(again) == pack_manifest(manifest)


def test_metrics_that_json_lacks_come_back():
    metrics = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1}
    again = unpack_manifest(pack_manifest(Manifest(1, {"dict": []}, (), metrics=metrics)), "m")
    assert list(map(repr, again.metrics.values())) == ["nan", "inf", "-inf", "0.1"]


def test_a_flipped_byte_anywhere_in_a_manifest_is_found():
    packed = small_manifest()
    unpack_manifest(packed, "m")
    for at, flip in itertools.product(range(len(packed)), (0x01, 0x08, 0x20, 0x80, 0xFF)):
        damaged = bytearray(packed)
        damaged[at] ^= flip
        with pytest.raises(CheckpointError):
            unpack_manifest(bytes(damaged), "m")


def test_a_truncated_or_continued_manifest_is_found():
    packed = small_manifest()
    for length in range(len(packed)):
        with pytest.raises(CheckpointError):
            unpack_manifest(packed[:length], "m")
    for more in (b"\0", b"}", b"}\n", packed):
        with pytest.raises(CheckpointError):
            unpack_manifest(packed + more, "m")


@pytest.mark.parametrize("version", [2, 9, 10, 123])
def test_a_manifest_of_a_newer_format_says_so(version):
    packed = small_manifest().replace(b'{"gpuckpt":1,', b'{"gpuckpt":%d,' % version, 1)
    with pytest.raises(FormatError, match=f"format {version}"):
        unpack_manifest(packed, "m")


def resealed(body: object) -> bytes:
    """A manifest of a stranger, whose checksum fits."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = layout.MANIFEST_HEAD % (layout.VERSION, checksum128(text))
    return head.encode() + text + layout.MANIFEST_TAIL


def body_of(packed: bytes) -> Any:
    return json.loads(packed[layout.MANIFEST_HEAD_NBYTES :].removesuffix(layout.MANIFEST_TAIL))


def _places(node: object, path: tuple = ()) -> list[tuple]:
    items = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    return [path, *(place for key, child in items for place in _places(child, (*path, key)))]


_ODD: list[Any] = [
    None,
    True,
    -1,
    2**63,
    2**200,
    0.5,
    "",
    "x",
    "../x",
    [],
    {},
    [[]],
    {"x": 1},
    [1, 2],
    math.nan,
]


def manifest_of_deltas() -> bytes:
    """A chunk of two int64 with a base, and that one's base; one of each has sparse planes."""
    extents = [Extent(layout.segment_name(at, "01234567", 0, 0), 64, 16) for at in (1, 2, 3)]
    known = ("0" * 32, "1" * 16)
    parts = (Plane("raw", 1), Plane("raw", 1))
    sparse = (Plane("sparse", 2, parts),) * 8
    chunk = ChunkEntry(0, 16, extents[0], *known, (Plane("raw", 16),), None)
    chunk = ChunkEntry(0, 16, extents[1], *known, (Plane("raw", 2),) * 8, chunk)
    chunk = ChunkEntry(0, 16, extents[2], *known, sparse, chunk)
    tensor = TensorEntry(Spec("a", "int64", (2,)), (chunk,), 3)
    return pack_manifest(Manifest(3, {"dict": [["a", {"tensor": 0}]]}, (tensor,)))


def manifest_of_turned() -> bytes:
    """A chunk of two int64, with a base that is turned; and one that is turned itself."""
    extents = [Extent(layout.segment_name(at, "01234567", 0, 0), 64, 16) for at in (1, 2)]
    known, planes = ("0" * 32, "1" * 16), (Plane("raw", 2),) * 8
    base = ChunkEntry(0, 16, extents[0], *known, planes, turned=True)
    chunk = ChunkEntry(0, 16, extents[1], *known, planes, base)
    tensors = tuple(
        TensorEntry(Spec(name, "int64", (2,)), (one,), 2)
        for name, one in (("a", base), ("b", chunk))
    )
    return pack_manifest(Manifest(2, {"dict": []}, tensors))


def test_turned_chunks_are_unpacked_as_they_were_packed():
    packed = manifest_of_turned()
    manifest = unpack_manifest(packed, "m")
    assert pack_manifest(manifest) == packed
    assert body_of(packed)["requires"] == ["delta", "turned"]
    turned = [[link.turned for link in one.chunks[0].chain] for one in manifest.tensors]
    assert turned == [[True], [False, True]]


@pytest.mark.parametrize(
    "change",
    [
        lambda row: [*row[:7], [["raw", 16]], "turned"],
        lambda row: [*row, "turned"],
        lambda row: [*row[:8], "turner"],
        lambda row: [*row[:8], ""],
        lambda row: [*row[:8], True],
        lambda row: [*row[:8], "turned", row[:8]],
        lambda row: [*row[:8], row[:8], "turned"],
        lambda row: [*row[:8], ["turned"]],
    ],
)
def test_a_strangers_turned_chunk_is_refused(change):
    body = body_of(manifest_of_turned())
    (row,) = body["tensors"][0]["chunks"]
    body["tensors"][0]["chunks"] = [change(row)]
    with pytest.raises(CorruptError):
        unpack_manifest(resealed(body), "m")
    index = {"requires": ["turned"], "bases": [], "step": 2, "tensors": body["tensors"][:1]}
    with pytest.raises(CorruptError):
        read_strangers_index(index)


def test_chunks_with_bases_are_unpacked_as_they_were_packed():
    packed = manifest_of_deltas()
    manifest = unpack_manifest(packed, "m")
    (chunk,) = manifest.tensors[0].chunks
    assert pack_manifest(manifest) == packed
    assert body_of(packed)["requires"] == ["delta", "sparse"]
    assert [link.extent.segment for link in chunk.chain] == manifest.segments
    assert len(chunk.chain) == 3
    assert manifest.encoded_nbytes == 16


@pytest.mark.parametrize("packed", [small_manifest(), manifest_of_deltas()], ids=["whole", "delta"])
def test_a_strangers_manifest_is_read_or_refused_but_nothing_else_is_raised(packed):
    body = body_of(packed)
    for path, odd in itertools.product(_places(body)[1:], [*_ODD, "drop"]):
        changed = json.loads(json.dumps(body))
        node = changed
        for key in path[:-1]:
            node = node[key]
        if odd == "drop":
            del node[path[-1]]
        else:
            node[path[-1]] = odd
        try:
            manifest = unpack_manifest(resealed(changed), "m")
        except CheckpointError:
            continue
        assert all(layout.segment_step(name) is not None for name in manifest.segments)
        assert manifest.epoch is None or type(manifest.epoch) is int


BASE = 8  # its place in a chunk's row
Row = list[Any]


def with_bases(row: Row, count: int) -> Row:
    """The row of a chunk with so many bases, of which the first has none."""
    base: Row = row[BASE][BASE]
    for _ in range(count):
        base = [*row[BASE][:BASE], base]
    return base


def on_its_base(row: Row, at: int, value: object) -> Row:
    return [*row[:BASE], [*row[BASE][:at], value, *row[BASE][at + 1 :]]]


def with_base_of(row: Row, nbytes: int) -> Row:
    return [*row[:BASE], [0, nbytes, 1, 64, nbytes, *row[5:7], [["raw", nbytes]]]]


def with_planes(row: Row, plane: object) -> Row:
    """The row of a chunk all of whose planes are this one."""
    planes = [plane] * 8
    return [*row[:4], 8 * plane[1], *row[5:7], planes, *row[BASE:]]  # type: ignore[index]


HOSTILE_ROWS: dict[str, Callable[[Row], Row]] = {
    "65 bases": lambda row: with_bases(row, 65),
    "900 bases": lambda row: with_bases(row, 900),
    "two bases": lambda row: [*row, row[BASE]],
    "no base": lambda row: [*row[:BASE], None],
    "an empty base": lambda row: [*row[:BASE], []],
    "a base that is shorter": lambda row: with_base_of(row, 8),
    "a base that is longer": lambda row: with_base_of(row, 24),
    "a base of 2^62 bytes": lambda row: on_its_base(row, 1, 2**62),
    "a base of another place": lambda row: on_its_base(row, 0, 8),
    "a base's base of another place": lambda row: on_its_base(
        row, BASE, on_its_base(row, 0, 8)[BASE]
    ),
    "a base in a segment that isn't listed": lambda row: on_its_base(row, 2, 3),
    "a base in a segment before the first": lambda row: on_its_base(row, 2, -1),
    "planes of a base that don't fill it": lambda row: on_its_base(row, 4, 15),
    "one plane and a base": lambda row: [*row[:7], [["raw", 16]], *row[BASE:]],
    "one plane of a base with a base": lambda row: on_its_base(row, 7, [["raw", 16]]),
    "parts that don't fill the plane": lambda row: with_planes(
        row, ["sparse", 2, ["raw", 1], ["raw", 0]]
    ),
    "parts of more than the plane": lambda row: with_planes(
        row, ["sparse", 1, ["raw", 1], ["raw", 2**62]]
    ),
    "parts of less than nothing": lambda row: with_planes(
        row, ["sparse", 2, ["raw", 3], ["raw", -1]]
    ),
    "a sparse plane longer than its raw bytes": lambda row: with_planes(
        row, ["sparse", 3, ["raw", 1], ["raw", 2]]
    ),
    "one part": lambda row: with_planes(row, ["sparse", 2, ["raw", 2]]),
    "three parts": lambda row: with_planes(row, ["sparse", 2, *([["raw", 1]] * 3)]),
    "no parts": lambda row: with_planes(row, ["sparse", 2]),
    "a raw plane of parts": lambda row: with_planes(row, ["raw", 2, ["raw", 1], ["raw", 1]]),
    "a zstd plane of parts": lambda row: with_planes(row, ["zstd", 2, ["raw", 1], ["raw", 1]]),
    "a sparse part": lambda row: with_planes(row, ["sparse", 2, ["sparse", 1], ["raw", 1]]),
    "a sparse part of parts": lambda row: with_planes(
        row, ["sparse", 2, ["raw", 1], ["sparse", 1, ["raw", 1], ["raw", 0]]]
    ),
    "a part of an unknown codec": lambda row: with_planes(
        row, ["sparse", 2, ["raw", 1], ["lz4", 1]]
    ),
    "a plane of an unknown codec": lambda row: with_planes(row, ["lz4", 2]),
}


@pytest.mark.parametrize("change", HOSTILE_ROWS.values(), ids=HOSTILE_ROWS)
def test_a_strangers_chunk_is_refused(change):
    body = body_of(manifest_of_deltas())
    (row,) = body["tensors"][0]["chunks"]
    for changed in (row, change(row)):
        body["tensors"][0]["chunks"] = [changed]
        in_segment = [*changed[:2], 0, *changed[3:]]
        index = {"requires": ["delta", "sparse"], "bases": body["segments"][1:], "step": 3}
        index["tensors"] = [{**body["tensors"][0], "chunks": [in_segment]}]
        if changed is row:
            unpack_manifest(resealed(body), "m")
            read_strangers_index(index)
            continue
        with pytest.raises((CorruptError, FormatError)):
            unpack_manifest(resealed(body), "m")
        with pytest.raises((CorruptError, FormatError)):
            read_strangers_index(index)


def test_64_bases_are_read_and_no_more():
    body = body_of(manifest_of_deltas())
    (row,) = body["tensors"][0]["chunks"]
    body["tensors"][0]["chunks"] = [with_bases(row, 64)]
    (chunk,) = unpack_manifest(resealed(body), "m").tensors[0].chunks
    assert len(chunk.chain) == 1 + 64


@pytest.mark.parametrize("count", [2_000, 200_000])
def test_bases_nested_deeper_than_a_parser_can_follow_are_refused(count):
    body = body_of(manifest_of_deltas())
    (row,) = body["tensors"][0]["chunks"]
    shell, inner = json.dumps([*row[BASE][:BASE], "HERE"]).split('"HERE"')
    deep = shell * count + json.dumps(row[BASE][BASE]) + inner * count
    body["tensors"][0]["chunks"] = ["DEEP"]
    with pytest.raises(CorruptError):
        unpack_manifest(resealed(json.dumps(body).replace('"DEEP"', deep).encode()), "m")
    index = {"requires": ["delta"], "bases": [], "step": 3, "tensors": body["tensors"]}
    with pytest.raises(CorruptError):
        read_strangers_index(json.dumps(index).replace('"DEEP"', deep).encode())


@pytest.mark.parametrize(
    ("required", "error"),
    [
        (["delta", "cold fusion"], FormatError),
        ([["delta"]], FormatError),
        ([None], FormatError),
        ("delta", CorruptError),
        ("", CorruptError),
        ({}, CorruptError),
        (None, CorruptError),
    ],
)
def test_what_a_file_requires_is_known_or_it_is_refused(required, error):
    body = body_of(manifest_of_deltas()) | {"requires": required}
    with pytest.raises(error):
        unpack_manifest(resealed(body), "m")
    with pytest.raises(error):
        read_strangers_index({"requires": required, "step": 3, "tensors": []})


@pytest.mark.parametrize("bases", [["../x"], ["notes.txt"], [3], 3, "x"])
def test_an_index_names_only_segments_as_its_bases(bases):
    with pytest.raises(CorruptError):
        read_strangers_index({"requires": ["delta"], "bases": bases, "step": 3, "tensors": []})


def test_an_index_lists_only_chunks_of_its_own_file():
    body = body_of(manifest_of_deltas())
    index = {"requires": ["delta", "sparse"], "bases": body["segments"][1:], "step": 3}
    index["tensors"] = body["tensors"]
    body["tensors"][0]["chunks"][0][2] = 1
    with pytest.raises(CorruptError, match="another file"):
        read_strangers_index(index)


def read_strangers_index(body: object) -> object:
    """What a segment with this index is read as."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    packed = zstandard.compress(text)
    digest = bytes.fromhex(checksum128(packed))
    trailer = layout.SegmentTrailer(layout.HEADER.size, len(packed), len(text), digest)
    name = layout.segment_name(3, "01234567", 0, 0)
    whole = layout.pack_header() + packed + layout.pack_trailer(trailer)
    return segments.read_index(MemoryStore({name: whole}), name)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 200_000, b'{"step":NaN}']
)
def test_a_strangers_text_that_is_no_manifest_is_corrupt(text):
    with pytest.raises(CorruptError):
        unpack_manifest(resealed(text), "m")


# Stores: see also tests/stores_contract.py


@given(st.lists(st.binary(max_size=40), max_size=6), st.integers(0, 50), st.integers(0, 50))
def test_a_file_is_read_as_it_was_appended(parts, offset, length):
    file = (memory := MemoryStore()).create("f")
    file.append(parts)
    whole = b"".join(parts)
    assert file.offset == memory.size("f") == len(whole)
    assert read_all(memory, "f") == whole
    room = bytearray(length)
    if offset + length <= len(whole):
        memory.read_into("f", offset, memoryview(room))
        assert bytes(room) == whole[offset : offset + length]
    elif length:
        with pytest.raises(CorruptError):
            memory.read_into("f", offset, memoryview(room))


def test_many_parts_are_written_in_their_order(tmp_path: Path):
    file = LocalStore(tmp_path).create("f")
    parts = [bytes([at % 251]) * (at % 7) for at in range(3000)]
    file.append(parts)
    file.close()
    assert (tmp_path / "f").read_bytes() == b"".join(parts)


# Sizes


@given(st.integers(0, 2**70))
def test_a_number_of_bytes_is_itself_also_as_text(nbytes):
    assert parse_nbytes(nbytes) == nbytes
    if nbytes < 2**40:
        assert parse_nbytes(f"{nbytes} KiB") == nbytes * 1024
        assert parse_nbytes(f" {nbytes}kb ") == nbytes * 1000


@given(st.floats(0, 1e12))
def test_a_number_of_seconds_is_itself(seconds):
    assert parse_seconds(seconds) == seconds


def test_sizes_and_durations_are_read_as_people_write_them():
    assert parse_nbytes("1.5 GiB") == 3 << 29
    assert parse_nbytes("500 MB") == 500_000_000
    assert parse_seconds("2 h") == 7200
    assert parse_seconds("10 min") == parse_seconds("10m") == 600
    assert parse_seconds(timedelta(days=1)) == parse_seconds("1 d") == 86400


@pytest.mark.parametrize(
    "size", ["", "GiB", "1 parsec", "-1", -1, True, "1e3", None, math.inf, math.nan]
)
def test_what_is_no_size_is_refused(size):
    for parse in (parse_nbytes, parse_seconds):
        with pytest.raises(InvalidError, match="like"):
            parse(size)
    with pytest.raises(InvalidError):
        parse_seconds(timedelta(seconds=-1))


@given(st.integers(0, 2**50))
def test_a_formatted_size_is_near_what_it_stands_for(nbytes):
    assert abs(parse_nbytes(format_nbytes(nbytes)) - nbytes) <= max(0.06 * nbytes, 0)


# Work in order


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 30), st.integers(1, 4), st.randoms(use_true_random=False))
def test_results_come_in_the_order_of_the_items(count, workers, rng):
    pauses = [rng.random() / 2000 for _ in range(count)]
    dropped: list[int] = []

    def work(at: int) -> int:
        time.sleep(pauses[at])
        return at * at

    results = list(ordered_map(work, range(count), workers=workers, drop=dropped.append))
    assert results == [at * at for at in range(count)]
    assert dropped == []


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.data())
def test_items_whose_result_nobody_got_are_dropped_once_each(count, workers, data):
    end = data.draw(st.sampled_from(("leave", "work fails", "items fail")))
    at_end = data.draw(st.integers(0, count - 1))
    drawn: list[int] = []
    dropped: list[int] = []
    got: list[int] = []

    def items() -> Iterator[int]:
        for at in range(count):
            if end == "items fail" and at == at_end:
                raise ValueError("items")
            drawn.append(at)
            yield at

    def work(at: int) -> int:
        if end == "work fails" and at >= at_end:
            raise ValueError("work", at)
        return at

    line = ordered_map(work, items(), workers=workers, drop=dropped.append)
    try:
        for result in line:
            got.append(result)
            if end == "leave" and result == at_end:
                break
    except ValueError as error:
        assert error.args == (("work", at_end) if end == "work fails" else ("items",))  # noqa: PT017
    line.close()
    assert got == list(range(at_end + 1 if end == "leave" else at_end))
    assert sorted([*got, *dropped]) == drawn
    assert not [t for t in threading.enumerate() if t.name.startswith("gpuckpt-")]


def test_a_source_that_waits_for_room_gets_it_when_the_caller_leaves():
    room = threading.Semaphore(2)

    def items() -> Iterator[int]:
        for at in itertools.count():
            room.acquire()
            yield at

    line = ordered_map(lambda at: at, items(), workers=2, drop=lambda _: room.release())
    assert next(iter(line)) == 0
    room.release()
    line.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("gpuckpt-")]


def test_a_source_is_closed_where_it_was_drawn_from():
    closed: list[str] = []

    def items() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            closed.append(threading.current_thread().name)

    line = ordered_map(lambda at: at, items(), workers=1)
    next(iter(line))
    line.close()
    assert closed == ["gpuckpt-draw"]


def test_a_source_that_fails_to_close_keeps_nobody_waiting():
    """As a device does that was lost: work fails by it, and then the source's end."""
    room = threading.Semaphore(2)

    def items() -> Iterator[int]:
        try:
            for at in itertools.count():
                room.acquire()
                yield at
        finally:
            raise ValueError("closing")

    def fails(at: int) -> int:
        raise ValueError("work", at)

    errors: list[ValueError] = []

    def draw() -> None:
        try:
            list(ordered_map(fails, items(), workers=1, drop=lambda _: room.release()))
        except ValueError as error:
            errors.append(error)

    drawing = threading.Thread(target=draw, daemon=True)
    drawing.start()
    drawing.join(20)
    assert [error.args for error in errors] == [("work", 0)]


def test_all_of_several_lines_are_closed_though_one_fails_to():
    closed: list[int] = []

    def items(at: int) -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            closed.append(at)
            raise ValueError(at)

    line = alternated([items(0), items(1)])
    next(line)
    next(line)
    with pytest.raises(ValueError, match="0"):
        line.close()  # type: ignore[attr-defined]
    assert sorted(closed) == [0, 1]


def test_an_arena_hands_out_each_slot_once():
    arena = new_arena(64, count=3)
    slots = [arena.take() for _ in range(3)]
    for number, slot in enumerate(slots):
        for area in (slot.raw, slot.planes, slot.coded):
            assert area.size == area_nbytes(64) > 64
            area[:] = number
    for number, slot in enumerate(slots):
        assert all((area == number).all() for area in (slot.raw, slot.planes, slot.coded))
    waiting = threading.Thread(target=lambda: arena.give(arena.take()))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    arena.give(random.choice(slots))
    waiting.join(5)
    assert not waiting.is_alive()
