"""Reads past the page cache give what reads through it give, or give way to them."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt import planes, segments
from gpuckpt.commit import open_step
from gpuckpt.errors import CorruptError
from gpuckpt.fingerprint import fingerprint
from gpuckpt.planes import Bytes
from gpuckpt.reading import Job, Wanted, read_chunks
from gpuckpt.resources import Resources
from gpuckpt.segments import PART_NBYTES, Reader
from gpuckpt.spec import Extent
from gpuckpt.stores import reads
from gpuckpt.stores.blocks import aligned_memory, lies_in_memory
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.memory import MemoryStore

KIB = 1 << 10
PAGE = 4 * KIB
SIZE = 300 * KIB + 123


@pytest.fixture
def store(tmp_path) -> LocalStore:
    """A directory with a file `f`, on a disk, and none of it is cached."""
    (tmp_path / "f").write_bytes(contents())
    with (tmp_path / "f").open("rb") as file:
        if lies_in_memory(file.fileno()):
            pytest.skip("the directory lies in memory")
    forget(tmp_path)
    return LocalStore(tmp_path)


def contents() -> bytes:
    return np.random.default_rng(1).bytes(SIZE)


def forget(directory: Path) -> None:
    """Let the system forget what it has cached of a directory's files."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(store: LocalStore, name: str = "f") -> float:
    """How much of a file is cached."""
    places = list(range(0, store.size(name), PAGE))
    with (Path(store.root) / name).open("rb") as file:
        return float(np.mean(reads.are_cached(file.fileno(), 0, places)))


def settled_share(store: LocalStore, least: float) -> float:
    """What is cached once so much is, which the system may be busy with; after a while, anyway."""
    end = time.monotonic() + 5
    while (share := cached_share(store)) < least and time.monotonic() < end:
        time.sleep(0.001)
    return share


def fetched(store: LocalStore) -> bytes | None:
    """All but the first few of the file's bytes, if they are fetched."""
    with store.open("f") as file:
        found = file.fetch(100, SIZE - 100, aligned_memory(SIZE + 2 * PAGE))
    return None if found is None else found.tobytes()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, SIZE), st.integers(1, SIZE), st.integers(0, 2 * PAGE), st.integers(0, 5000))
def test_what_is_fetched_is_what_the_file_holds(store, offset, length, extra, shift):
    forget(Path(store.root))
    room = aligned_memory(SIZE + 4 * PAGE)[shift : shift + length + extra]
    with store.open("f") as file:
        found = file.fetch(offset, length, room)
    fits = extra >= (-shift % PAGE) + offset % PAGE + (-(offset + length) % PAGE)
    if found is None:
        assert not fits or offset + length > SIZE or length < reads.FEWEST_NBYTES
    else:
        assert found.tobytes() == contents()[offset : offset + length]
        assert np.shares_memory(found, room)


def test_the_first_to_read_leaves_a_page_in_the_cache_and_the_second_all(store):
    assert fetched(store) == contents()[100:]
    assert 0 < settled_share(store, 1e-9) < 0.2
    assert fetched(store) is None
    assert settled_share(store, 1) == 1


def test_what_is_cached_is_not_fetched(store):
    store.read_into("f", 0, memoryview(bytearray(SIZE)))
    assert settled_share(store, 1) == 1
    assert fetched(store) is None


def test_nothing_is_fetched_where_the_system_does_not_tell(store, monkeypatch):
    monkeypatch.setattr(reads, "_mincore", lambda *_: -1)
    assert fetched(store) is None


def test_after_a_fetch_any_bytes_can_be_read(store):
    room = bytearray(777)
    with store.open("f") as file:
        assert file.fetch(0, SIZE, aligned_memory(SIZE + 2 * PAGE)) is not None
        file.read_into(4321, memoryview(room))
    assert room == contents()[4321 : 4321 + 777]


@pytest.mark.parametrize("function", ["set_direct", "read_some"])
def test_a_file_system_that_refuses_direct_reads_is_read_through_the_cache(
    store, monkeypatch, function
):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EINVAL, "no")

    with store.open("f") as file:
        with monkeypatch.context() as patch:
            patch.setattr(reads, function, refuse)
            assert file.fetch(0, SIZE, aligned_memory(SIZE + 2 * PAGE)) is None
        room = bytearray(SIZE)
        file.read_into(0, memoryview(room))
    assert room == contents()


def test_a_file_that_ends_too_early_says_where(store):
    with store.open("f") as file:
        for length in (reads.FEWEST_NBYTES, 8 * SIZE):  # with and without a middle
            room = aligned_memory(length + 2 * PAGE)
            assert file.fetch(SIZE + 1 - reads.FEWEST_NBYTES, length, room) is None
        with pytest.raises(CorruptError, match=f"ends at {SIZE}, {SIZE + 1} bytes expected"):
            file.read_into(SIZE - 10, memoryview(bytearray(11)))


def state() -> dict[str, np.ndarray]:
    """Large and small tensors, some of which get smaller."""
    random = np.random.default_rng(7)
    return {
        "large": random.standard_normal((3 << 20) - 5).astype(np.float32),
        **{f"small{at}": random.standard_normal(100 + at).astype(np.float32) for at in range(40)},
        "noise": np.frombuffer(random.bytes((5 << 20) + 3), np.uint8),
        "zeros": np.zeros(1 << 20, np.float16),
    }


@pytest.mark.parametrize("codec", ["raw", "auto", "zstd"])
@pytest.mark.parametrize("cold", [True, False])
def test_a_restore_gives_the_same_bytes_from_the_disk_and_from_the_cache(tmp_path, codec, cold):
    expected = state()
    gpuckpt.save(tmp_path, expected, 1, codec=codec)
    for path in tmp_path.iterdir():
        path.read_bytes()
    if cold:
        forget(tmp_path)
    found = gpuckpt.load(tmp_path)
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_a_cold_restore_reads_whole_chunks_past_the_page_cache(tmp_path, store, codec):
    root = tmp_path / codec
    noise = np.frombuffer(np.random.default_rng(2).bytes(9 << 20), np.uint8)
    weights = np.random.default_rng(2).standard_normal(9 << 18, np.float32)
    checkpoint = gpuckpt.save(root, {"noise": noise, "weights": weights}, 1, codec=codec)
    forget(root)
    assert gpuckpt.load(root)["noise"].tobytes() == noise.tobytes()
    (name,) = open_step(LocalStore(root), checkpoint.step).segments
    assert cached_share(LocalStore(root), name) < 0.1


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("cold", [True, False])
def test_a_damaged_byte_is_found_wherever_it_comes_from(tmp_path, codec, cold):
    gpuckpt.save(tmp_path, state(), 1, codec=codec)
    manifest = open_step(LocalStore(tmp_path))
    entry = next(one for one in manifest.tensors if one.spec.name == "large")
    extent = entry.chunks[1].extent
    with (tmp_path / extent.segment).open("r+b") as file:
        file.seek(extent.offset + extent.length - 1)
        (byte,) = file.read(1)
        file.seek(extent.offset + extent.length - 1)
        file.write(bytes([byte ^ 1]))
    if cold:
        forget(tmp_path)
    with pytest.raises(
        CorruptError, match=f"large in .*{extent.segment} at offset {extent.offset}"
    ):
        gpuckpt.load(tmp_path)


class FetchingStore(MemoryStore):
    """Files that are fetched as a whole, with a note of each fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetches: list[tuple[str, int, int]] = []
        self.opened = 0

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[FetchingFile]:
        self.opened += 1
        yield FetchingFile(self, name)


class FetchingFile:
    def __init__(self, store: FetchingStore, name: str) -> None:
        self._store, self._name = store, name

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._store.read_into(self._name, offset, buffer)

    def fetch(self, offset: int, length: int, room: Bytes) -> Bytes | None:
        if length + 3 > room.size:
            return None
        self._store.fetches.append((self._name, offset, length))
        self.read_into(offset, room[3 : 3 + length].data)
        return room[3 : 3 + length]


def test_chunks_that_follow_each_other_are_fetched_at_once(tmp_path):
    store, expected = FetchingStore(), state()
    gpuckpt.save(tmp_path, expected, 1, codec="auto", store=store)
    resources = Resources("64 MiB")
    arena = resources.arena(["cpu"])
    entries = [one for one in open_step(store).tensors if one.spec.name.startswith("small")]
    wanted = [
        Wanted(Job(store, one, ()), one.chunks[0], [np.empty(one.spec.nbytes, np.uint8)])
        for one in entries
    ]
    store.fetches.clear()
    store.opened = 0
    found = read_chunks(wanted, arena.take(), arena)
    assert store.opened == len(store.fetches) == 1
    for one, taken in zip(wanted, found, strict=True):
        assert one.rooms[0].tobytes() == expected[one.job.entry.spec.name].tobytes()
        assert taken == one.chunk.fingerprint == fingerprint(one.rooms[0].data)
    store.fetches.clear()
    read_chunks(wanted[::2], arena.take(), arena)
    assert len(store.fetches) == len(wanted[::2])


@pytest.mark.parametrize("codec", ["raw", "auto", "zstd", "delta"])
def test_a_state_whose_chunks_are_fetched_comes_back(tmp_path, codec):
    store, changing = FetchingStore(), state()
    with gpuckpt.Checkpointer(tmp_path, store=store, codec=codec) as ckpt:
        for step in range(1, 4):
            ckpt.save(step, changing).result()
            changing["large"].view(np.uint32)[:] += 1
        last = ckpt.save(4, changing)
        last.result()
        assert (last.stats.delta_nbytes > 0) == (codec == "delta")
        store.fetches.clear()
        restored = {name: np.zeros_like(array) for name, array in changing.items()}
        ckpt.restore(restored)
    assert store.fetches
    for name, array in changing.items():
        assert restored[name].tobytes() == array.tobytes()


def test_a_fingerprint_that_nobody_wants_is_not_taken(tmp_path):
    store = MemoryStore()
    gpuckpt.save(tmp_path, {"w": np.arange(9)}, 1, store=store)
    (entry,) = open_step(store).tensors
    arena = Resources("64 MiB").arena(["cpu"])
    job = Job(store, entry, ())
    wanted = Wanted(job, entry.chunks[0], [np.empty(72, np.uint8)], looked_at=False)
    assert read_chunks([wanted], arena.take(), arena) == [None]


def test_a_segment_is_read_part_by_part_whether_it_was_fetched_or_not():
    store = FetchingStore()
    data = np.random.default_rng(3).bytes(2 * PART_NBYTES + 17)
    file = store.create("s")
    file.append([b"header", data])
    extent = Extent("s", 6, len(data))
    for fetched in (False, True):
        room = np.zeros(extent.length, np.uint8)
        with store.open("s") as opened:
            reader = Reader(opened)
            if fetched:
                reader.fetch([extent], np.empty(extent.length + 3, np.uint8))
            assert (reader.held(extent) is not None) == fetched
            parts = [part.nbytes for part in reader.read(extent, room)]
        assert room.tobytes() == data
        assert parts == [PART_NBYTES, PART_NBYTES, 17]
    with segments.open_segment(MemoryStore({"s": b"header" + data}), "s") as reader:
        assert b"".join(map(bytes, reader.read(extent, room))) == data


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 9000), st.integers(1, 5000), st.booleans())
def test_joining_in_parts_is_joining(width, count, step, native):
    raw = np.frombuffer(np.random.default_rng(count).bytes(width * count), np.uint8)
    parts = [raw[k::width].copy() for k in range(width)]
    out = np.zeros_like(raw)
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(planes, "native_for", lambda *_: None)
        found = [part.tobytes() for part in planes.join_in_parts(parts, out, step)]
    assert out.tobytes() == b"".join(found) == raw.tobytes()
    assert all(len(part) == step * width for part in found[:-1])
