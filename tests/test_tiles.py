"""Chunks in tiles: each tile can be read without the others, and all together are the chunk."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar, cast
from unittest import mock

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt import cutting, native, tiling
from gpuckpt.arena import Slot
from gpuckpt.boxes import Box
from gpuckpt.cutting import longest_chunk, tiles_of
from gpuckpt.dtypes import to_numpy
from gpuckpt.entries import CODECS
from gpuckpt.fingerprint import checksum, fingerprint, leaf_digests
from gpuckpt.manifest import Manifest
from gpuckpt.plan import plan_chunks
from gpuckpt.planes import split
from gpuckpt.resources import Resources
from gpuckpt.spec import ChunkEntry, Ends, Extent, Spec
from gpuckpt.stores.memory import MemoryStore
from gpuckpt.stores.objects import ObjectFile
from gpuckpt.tilecoding import decode_blocks, decode_tiles, encode_tiles, tiles_among
from gpuckpt.tileindex import BLOCKS, index_nbytes, planes_nbytes
from gpuckpt.tiling import (
    TILE_NBYTES_MAX,
    box_of,
    check_tiles,
    chunk_count,
    from_tiles,
    grid_of,
    to_tiles,
    within,
)
from gpuckpt.verify import verify_chunks
from tests import test_native
from tests.often import often
from tests.resharding import CountingStore, Piece, divided, restore_pieces, save_pieces
from tests.test_resharding import DTYPES, random_array, random_boxes, room_for, unique

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")
# Elements of a chunk that is drawn.
MOST = 1 << 10


@st.composite
def tilings(draw: st.DrawFn) -> Ends:
    """Of chunks with 0 to 4 axes, of MOST elements at most.

    Four axes drawn at random are of millions of elements now and then.
    """
    axes: list[tuple[int, ...]] = []
    for _ in range(draw(st.integers(0, 4))):
        spans = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
        axes.append(tuple(np.cumsum(spans).tolist()))
    while math.prod(each[-1] for each in axes) > MOST:
        axes.pop(0)
    return tuple(axes)


@st.composite
def boxes_within(draw: st.DrawFn, ends: Ends) -> Box:
    """A box that isn't empty."""
    spans = [sorted(draw(st.tuples(*[st.integers(0, one[-1] - 1)] * 2))) for one in ends]
    return Box(tuple(a for a, _ in spans), tuple(b - a + 1 for a, b in spans))


def both(work: Callable[[], T]) -> tuple[T, T]:
    """What comes out with the compiled loops, where they are, and without."""
    with mock.patch.object(tiling, "native_for", return_value=None):
        without = work()
    return work(), without


def slot_of(nbytes: int) -> Slot:
    return Slot(*np.empty((3, nbytes + (64 << 10)), np.uint8))


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Tiles of a few elements, of chunks of any size."""
    cutting._borders.cache_clear()
    least: dict[str, Any] = {"TILE_NBYTES": 16, "TILED_NBYTES": 1, "RUN_NBYTES": 1, "EXTENT": 1}
    with mock.patch.multiple(cutting, **{f"{name}_LEAST": n for name, n in least.items()}):
        yield
    cutting._borders.cache_clear()


@settings(deadline=None, max_examples=often(150))
@given(tilings(), st.sampled_from([1, 2, 3, 8, 12]), st.booleans())
def test_tiles_put_back_are_the_chunk(ends: Ends, item: int, large: bool):
    """Also with the compiled loops, which take no small ones."""
    if large:
        ends = (*ends, (200, 3000))
    grid = grid_of(ends)
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, math.prod(grid.shape) * item, np.uint8)

    def there_and_back() -> tuple[bytes, bytes]:
        tiled, back = np.empty_like(raw), np.empty_like(raw)
        to_tiles(raw, grid, item, tiled)
        from_tiles(tiled, grid, item, back)
        return tiled.tobytes(), back.tobytes()

    with_loops, without = both(there_and_back)
    assert with_loops == without
    assert with_loops[1] == raw.tobytes()


@given(tilings(), st.data())
def test_the_tiles_that_have_elements_of_a_box_are_found(ends: Ends, data: st.DataObject):
    grid, box = grid_of(ends), data.draw(boxes_within(ends))
    wanted = [number for number in range(grid.count) if grid.box(number) & box is not None]
    assert grid.among(box).tolist() == wanted
    found = [n for first, last in tiles_among(grid, [box]) for n in range(first, last)]
    assert found == wanted
    assert [grid.box(number).count for number in range(grid.count)] == grid.sizes.tolist()


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), max_size=4).map(tuple), st.integers(1, 200))
def test_chunks_are_boxes_of_one_size_but_for_the_last(shape: tuple[int, ...], most: int):
    count, whole = chunk_count(shape, most), math.prod(shape)
    assert 0 < count <= most
    for first in range(0, whole, count):
        assert box_of(shape, first, min(first + count, whole)) is not None


@given(tilings().filter(len), st.sampled_from([1, 2, 8, 4096]))
def test_no_tile_is_too_large(ends: Ends, item: int):
    shape = tuple(each[-1] for each in ends)
    found = within(Box((0,) * len(shape), shape), ends, item)
    assert all(set(one) <= set(other) for one, other in zip(ends, found, strict=True))
    assert int(grid_of(found).sizes.max()) * item <= TILE_NBYTES_MAX


@settings(deadline=None, max_examples=often(60))
@given(st.lists(st.integers(1, 70_000), min_size=1, max_size=20), st.integers(0, 9))
def test_a_tile_s_check_is_that_of_a_leaf(sizes: list[int], seed: int):
    sizes = [min(size, TILE_NBYTES_MAX) for size in sizes]
    plane = np.random.default_rng(seed).integers(0, 256, sum(sizes)).astype(np.uint8)
    one, other = both(lambda: check_tiles(plane, np.array(sizes, np.uint32)).tolist())
    assert one == other
    assert one[0] == int.from_bytes(leaf_digests(plane[: sizes[0]].data)[:8], "little")


def weights(
    shape: tuple[int, ...], dtype: str = "bfloat16", seed: int = 0
) -> npt.NDArray[np.uint8]:
    numbers = np.random.default_rng(seed).standard_normal(shape, np.float32) * 0.02
    return numbers.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@settings(deadline=None, max_examples=often(60))
@given(
    st.lists(st.integers(1, 300), min_size=40, max_size=90),
    st.sampled_from([40, 700, 20_000]),
    st.data(),
)
def test_runs_of_tiles_are_decoded_with_the_first_block(
    sizes: list[int], longest: int, data: st.DataObject
):
    """And the whole frame is one that any decoder reads."""
    loops = native.native()
    if loops is None:
        pytest.skip("no compiled loops")
    spans = np.array([1 + size * longest // 300 for size in sizes], np.uint32)
    assume(int(spans.sum()) > 64)
    exponents = np.random.default_rng(1).geometric(0.4, int(spans.sum())).astype(np.uint8)
    room = np.empty(exponents.size + 2000, np.uint8)
    length, ends = loops.huffman_tiles(exponents, spans, room)
    assert length
    assert zstandard.ZstdDecompressor().decompress(room[:length].tobytes()) == exponents.tobytes()
    borders = data.draw(st.sets(st.integers(0, len(sizes)), min_size=2, max_size=8).map(sorted))
    runs = list(zip(borders[::2], borders[1::2], strict=False))
    starts = np.concatenate([[0], np.cumsum(spans, dtype=np.int64)]).tolist()
    found = decode_blocks(
        (room[: ends[0]].tobytes(), exponents.size),
        [room[ends[first] : ends[last]] for first, last in runs],
        [(starts[first], starts[last]) for first, last in runs],
        slot_of(64),
        "here",
    )
    wanted = [exponents[starts[first] : starts[last]].tobytes() for first, last in runs]
    assert found.tobytes() == b"".join(wanted)


@settings(deadline=None, max_examples=often(30))
@given(st.lists(st.integers(1, 5000), min_size=2, max_size=30), st.integers(0, 9))
def test_every_machine_s_loops_write_the_same_tiles(sizes: list[int], seed: int):
    spans = np.array(sizes, np.uint32)
    rng = np.random.default_rng(seed)
    plane = rng.geometric(rng.choice([0.05, 0.4]), int(spans.sum())).astype(np.uint8)
    outcomes = []
    for loops in test_native.both():
        room = test_native.Room(plane.size)
        length, ends = loops.huffman_tiles(plane, spans, room.array)
        assert room.sound()
        checks = loops.check_tiles(plane, spans).tolist()
        outcomes.append((room.array[:length].tobytes(), ends.tolist() if length else [], checks))
    assert outcomes[0] == outcomes[1]


@settings(deadline=None, max_examples=often(60))
@given(tilings(), st.sampled_from([1, 2, 3, 8, 12]), st.integers(0, 9))
def test_the_loops_put_tiles_as_numpy_does_and_write_nothing_outside(
    ends: Ends, item: int, offset: int
):
    grid = grid_of(ends)
    assume(grid.folded is not None)
    assert grid.folded is not None
    raw = np.random.default_rng(0).integers(0, 256, math.prod(grid.shape) * item, np.uint8)
    wanted = np.empty_like(raw)
    with mock.patch.object(tiling, "native_for", return_value=None):
        to_tiles(raw, grid, item, wanted)
    for loops in test_native.both():
        tiled, back = (test_native.Room(raw.size, offset) for _ in range(2))
        loops.tile(raw, tiled.array, item, grid.folded)
        loops.tile(tiled.array, back.array, item, grid.folded, back=True)
        assert tiled.array.tobytes() == wanted.tobytes()
        assert back.array.tobytes() == raw.tobytes()
        assert tiled.sound()
        assert back.sound()


def test_a_plane_that_does_not_fit_writes_no_frame():
    loops = native.native()
    if loops is None:
        pytest.skip("no compiled loops")
    noise = np.random.default_rng(1).integers(0, 256, 50_000).astype(np.uint8)
    sizes = np.full(50, 1000, np.uint32)
    room = np.full(60_000, 77, np.uint8)
    assert loops.huffman_tiles(noise, sizes, room[:48_500])[0] == 0
    assert (room[48_500:] == 77).all()
    constant = np.zeros(50_000, np.uint8)
    assert loops.huffman_tiles(constant, sizes, room)[0] == 0


@settings(deadline=None, max_examples=often(60))
@given(
    tilings().filter(len), st.sampled_from(["float32", "bfloat16", "int8", "float64"]), st.data()
)
def test_decoding_undoes_encoding_in_tiles(ends: Ends, dtype: str, data: st.DataObject):
    shape, spec = (*(each[-1] for each in ends), 64), Spec("w", dtype, ())
    ends = within(Box((0,) * len(shape), shape), (*ends, (30,)), to_numpy(dtype).itemsize)
    grid = grid_of(ends)
    raw = weights(grid.shape, dtype).view(np.uint8).reshape(-1)
    whole = data.draw(st.booleans())
    planes = [raw] if whole else split(raw, spec.width, np.empty_like(raw), turned=spec.turned)
    turned = spec.turned and not whole
    tries = [data.draw(st.booleans()) for _ in planes]
    slot, print_of = slot_of(raw.size), fingerprint(raw.data)
    room = slot, slot_of(raw.size)
    encoded = encode_tiles(planes, tries, ends, room, print_of, turned=turned)
    text = np.frombuffer(b"".join(encoded.parts), np.uint8)
    assert len(encoded.parts[-1]) == index_nbytes(encoded.planes, ends)
    entry = ChunkEntry(
        *(0, raw.size, Extent("s", 0, text.size), print_of, "", encoded.planes),
        turned=encoded.turned,
        tiles=encoded.tiles,
    )
    rooms = np.empty((data.draw(st.sampled_from([1, len(encoded.planes)])), raw.size), np.uint8)
    each = [room[: raw.size // len(rooms)] for room in rooms]
    decode_tiles(text, entry, (slot_of(raw.size), slot_of(raw.size)), each, "here")
    wanted = [raw] if len(each) == 1 else planes
    assert [one.tobytes() for one in each] == [one.tobytes() for one in wanted]


def tiled(array: npt.NDArray[np.uint8], boxes: list[Box], name: str = "w") -> list[Piece]:
    return [Piece(name, array[b.slices].copy(), b, array.shape, tiled=True) for b in boxes]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("seed", range(120))
def test_what_n_ranks_saved_in_tiles_m_ranks_restore(seed: int):
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 60) for _ in range(rng.choice([1, 2, 2, 2, 3, 4])))
    while math.prod(shape) > 20_000:
        shape = tuple(max(extent // 2, 1) for extent in shape)
    dtype = rng.choice(DTYPES)
    array = weights(shape, dtype) if "float" in dtype else random_array(rng, shape, dtype)
    boxes = unique(random_boxes(rng, shape, rng.randint(1, 16)))
    store, codec = MemoryStore(), rng.choice(["raw", "zstd", "zstd", "auto"])
    chunk = rng.choice([256, 4096, 1 << 16])
    pieces = tiled(array, boxes)
    manifest = save_pieces(store, pieces, codec=codec, chunk_nbytes=chunk)
    targets = [
        Piece("w", room_for(rng, box, array.dtype), box, shape)
        for box in random_boxes(rng, shape, rng.randint(1, 16))
    ]
    restore_pieces(store, manifest, targets)
    for target in targets:
        assert target.box is not None
        assert target.array.tobytes() == array[target.box.slices].tobytes(), target.box
    assert gpuckpt.load("", store=store)["w"].tobytes() == array.tobytes()
    again = save_pieces(store, pieces, 2, previous=manifest, full_every=10, chunk_nbytes=chunk)
    assert again.tensors == manifest.tensors, "nothing of it is written twice"


def saved(store: MemoryStore, saved_by: dict[int, int], codec: str = "zstd") -> Manifest:
    array = weights((1024, 1024))
    return save_pieces(store, tiled(array, divided(array.shape, saved_by)), codec=codec)


@pytest.mark.parametrize("codec", ["zstd", "raw"])
@pytest.mark.parametrize("wanted", [{0: 12}, {1: 12}, {0: 3, 1: 4}, {0: 2, 1: 8}])
@pytest.mark.parametrize("held", [{0: 4}, {1: 4}, {0: 2, 1: 2}])
def test_ranks_of_any_mesh_read_what_they_need(
    held: dict[int, int], wanted: dict[int, int], codec: str
):
    """Of a tensor of 2 MiB; without the compiled loops planes that are coded are read whole."""
    store, array = CountingStore(), weights((1024, 1024))
    manifest = saved(store, held, codec)
    chunks = [chunk for entry in manifest.tensors for chunk in entry.chunks]
    assert all(chunk.tiles for chunk in chunks)
    store.read_nbytes = 0
    for box in divided(array.shape, wanted):
        target = Piece("w", np.zeros(box.shape, array.dtype), box, array.shape)
        restore_pieces(store, manifest, [target])
        assert target.array.tobytes() == array[box.slices].tobytes()
    if native.native() is not None or codec == "raw":
        assert store.read_nbytes <= 1.1 * sum(chunk.extent.length for chunk in chunks)


class Slow(CountingStore):
    """A store of files that want to be asked for much at once."""

    requests = 0

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[ObjectFile]:
        yield ObjectFile(cast(Any, self), name)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.requests += 1
        super().read_into(name, offset, buffer)


def test_where_requests_take_long_a_chunk_is_read_in_few():
    store, array = Slow(), weights((1024, 1024))
    manifest = saved(store, {0: 4})
    for ways in ({0: 3}, {1: 3}):
        store.requests = 0
        box = divided(array.shape, ways)[0]
        target = Piece("w", np.zeros(box.shape, array.dtype), box, array.shape)
        restore_pieces(store, manifest, [target])
        assert target.array.tobytes() == array[box.slices].tobytes()
        assert store.requests <= 12


def test_who_wants_one_tile_reads_little_more():
    store = CountingStore()
    manifest = saved(store, {0: 2}, "raw")
    array, box = weights((1024, 1024)), Box((3, 5), (2, 2))
    target = Piece("w", np.zeros(box.shape, array.dtype), box, array.shape)
    store.read_nbytes = 0
    restore_pieces(store, manifest, [target])
    assert target.array.tobytes() == array[box.slices].tobytes()
    assert 0 < store.read_nbytes < 16 << 10


def is_blamed(store: MemoryStore, manifest: Manifest, target: Piece) -> bool:
    """Whether a shard isn't restored, because the first one that was saved is damaged."""
    try:
        restore_pieces(store, manifest, [target])
    except gpuckpt.CorruptError as error:
        return error.where.startswith("w[0:512, 0:1024] in memory/")
    return False


@pytest.mark.parametrize("codec", ["zstd", "raw"])
def test_damage_of_any_byte_that_is_read_of_a_tile_is_found(codec: str):
    store = MemoryStore()
    manifest = saved(store, {0: 2}, codec)
    chunk = manifest.tensors[0].chunks[0]
    clean = bytes(store.files[chunk.extent.segment])
    wanted, rng = Box((0, 0), (100, 32)), random.Random(0)
    array, count = weights((1024, 1024)), 0
    for at in [0, 7, 40, chunk.extent.length - 1, *rng.sample(range(chunk.extent.length), 60)]:
        store.files[chunk.extent.segment][chunk.extent.offset + at] ^= 16
        target = Piece("w", np.zeros(wanted.shape, array.dtype), wanted, array.shape)
        found = is_blamed(store, manifest, target)
        count += found
        assert found or target.array.tobytes() == array[wanted.slices].tobytes()
        with pytest.raises(gpuckpt.CorruptError):
            gpuckpt.load("", store=store)
        store.files[chunk.extent.segment][:] = clean
    assert 0 < count < 60


def test_tiles_of_another_chunk_are_not_taken_for_this_one_s():
    store = MemoryStore()
    manifest = saved(store, {0: 2})
    one, other = manifest.tensors
    strange = replace(one.chunks[0], extent=other.chunks[0].extent)
    entry = replace(one, chunks=(strange, *one.chunks[1:]))
    manifest = replace(manifest, tensors=(entry, other))
    box = Box((0, 0), (100, 32))
    target = Piece("w", np.zeros(box.shape, ml_dtypes.bfloat16), box, (1024, 1024))
    with pytest.raises(gpuckpt.CorruptError):
        restore_pieces(store, manifest, [target])


def test_tiles_that_an_index_is_wrong_about_are_read_with_their_chunk():
    store, array = MemoryStore(), weights((1024, 1024))
    manifest = saved(store, {0: 2}, "raw")
    one, other = manifest.tensors
    chunk = one.chunks[0]
    extent, data = chunk.extent, store.files[chunk.extent.segment]
    assert not verify_chunks(store, manifest, Resources("64 MiB"))
    data[extent.offset + planes_nbytes(chunk)] ^= 1
    coded = bytes(data[extent.offset : extent.offset + extent.length])
    strange = replace(chunk, checksum=checksum([memoryview(coded)]))
    entry = replace(one, chunks=(strange, *one.chunks[1:]))
    manifest = replace(manifest, tensors=(entry, other))
    box = Box((0, 0), (100, 32))
    target = Piece("w", np.zeros(box.shape, array.dtype), box, array.shape)
    restore_pieces(store, manifest, [target])
    assert target.array.tobytes() == array[box.slices].tobytes()
    (damage,) = verify_chunks(store, manifest, Resources("64 MiB"))
    assert (damage.file, damage.offset) == (extent.segment, extent.offset)
    assert "tile" in damage.reason


def test_sealed_chunks_are_read_whole():
    store = CountingStore()
    manifest = saved(store, {0: 2}, "raw")
    one, other = manifest.tensors
    chunks = tuple(replace(chunk, digest="0" * 64) for chunk in one.chunks)
    manifest = replace(manifest, tensors=(replace(one, chunks=chunks), other))
    box = Box((0, 0), (100, 32))
    target = Piece("w", np.zeros(box.shape, ml_dtypes.bfloat16), box, (1024, 1024))
    with pytest.raises(gpuckpt.AuthenticationError):
        restore_pieces(store, manifest, [target])


def test_a_masters_chunks_end_where_its_copys_do():
    for shape in ((300, 7000), (4096, 4096), (5000,), (8, 600, 500), (31, 1009, 23)):
        specs = [
            Spec("w", dtype, shape, offset=(0,) * len(shape), whole=(2 * shape[0], *shape[1:]))
            for dtype in ("float32", "bfloat16")
        ]
        one, other = (
            [
                (chunk.start // to_numpy(spec.dtype).itemsize, tiles_of(spec, chunk))
                for chunk in plan_chunks([spec], chunk_nbytes=1 << 20)
            ]
            for spec in (replace(spec, tiled=True) for spec in specs)
        )
        assert [start for start, _ in one] == [start for start, _ in other]
        assert all(tiles for _, tiles in one)


def test_rounded_copies_of_tiled_shards_are_derived():
    master = weights((600, 400), "float32")
    copy = master.astype(ml_dtypes.bfloat16)
    boxes, store = divided(master.shape, {0: 3}), CountingStore()
    pieces = [*tiled(master, boxes, "master"), *tiled(copy, boxes, "copy")]
    manifest = save_pieces(store, pieces)
    derived = {e.spec.name for e in manifest.tensors if all(c.sources for c in e.chunks)}
    assert derived == {"copy"}
    store.read_nbytes = 0
    for box in divided(master.shape, {1: 8}):
        target = Piece("copy", np.zeros(box.shape, copy.dtype), box, copy.shape)
        restore_pieces(store, manifest, [target])
        assert target.array.tobytes() == copy[box.slices].tobytes()
    if native.native() is not None:
        assert store.read_nbytes <= 1.1 * manifest.encoded_nbytes


@pytest.mark.parametrize(
    "shape", [(1024, 1024, 3, 3), (16, 64, 64, 128), (1, 256, 5, 512), (64,) * 4, (7, 900, 31)]
)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_loops_take_the_tiles_of_tensors_of_many_axes(shape: tuple[int, ...], dtype: str):
    whole = (2 * shape[0], *shape[1:])
    shard = Spec("w", dtype, shape, offset=(0,) * len(shape), whole=whole, tiled=True)
    chunks = list(plan_chunks([shard], chunk_nbytes=4 << 20))
    for chunk in chunks:
        found = tiles_of(shard, chunk)
        assert found
        assert grid_of(found).folded is not None


def test_short_axes_but_the_first_are_not_cut():
    assert cutting._borders((1024, 1024, 3, 3), 4)[2:] == ((), ())
    assert cutting._borders((8, 600, 500), 4)[0]


def test_only_large_chunks_of_shards_are_tiled():
    shard = Spec("w", "bfloat16", (64, 64), offset=(0, 0), whole=(128, 64), tiled=True)
    (chunk,) = plan_chunks([shard], chunk_nbytes=4 << 20)
    assert tiles_of(shard, chunk) == ()
    large = replace(shard, shape=(640, 640), whole=(1280, 640))
    (chunk,) = plan_chunks([large], chunk_nbytes=4 << 20)
    assert tiles_of(large, chunk)
    assert tiles_of(replace(large, tiled=False), chunk) == ()
    assert tiles_of(replace(large, offset=None, whole=None), chunk) == ()
    assert longest_chunk(large, 4 << 20) == large.nbytes
    assert BLOCKS not in CODECS
