"""Chunks are read part by part, from the disk and from the cache alike."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt import planes, segments
from gpuckpt.commit import open_step
from gpuckpt.errors import CorruptError
from gpuckpt.fingerprint import fingerprint
from gpuckpt.native import native
from gpuckpt.reading import Job, Wanted, read_chunks
from gpuckpt.resources import Resources
from gpuckpt.segments import PART_NBYTES
from gpuckpt.spec import Extent
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.memory import MemoryStore


def forget(directory: Path) -> None:
    """Let the system forget what it has cached of a directory's files."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


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


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("key", [None, b"k" * 32])
def test_a_restore_is_the_same_without_the_compiled_loops(tmp_path, monkeypatch, codec, key):
    expected = state()
    gpuckpt.save(tmp_path, expected, 1, codec=codec, key=key)
    monkeypatch.setattr("gpuckpt.stores.opened.native", lambda: None)
    found = gpuckpt.load(tmp_path, key=key)
    assert all(found[name].tobytes() == array.tobytes() for name, array in expected.items())


def test_a_file_that_ends_within_a_chunk_says_where_also_by_the_loops(tmp_path):
    (tmp_path / "f").write_bytes(bytes(50_000))
    if native() is None:
        pytest.skip("no compiled loops")
    with (
        LocalStore(tmp_path).open("f") as file,
        pytest.raises(CorruptError, match="ends at 50000, 60000 bytes expected"),
    ):
        file.read_seen(0, np.empty(60_000, np.uint8))


class OpeningStore(MemoryStore):
    """Files that are kept open, with a note of each."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        super().__init__(files)
        self.opened = 0

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[OpenFile]:
        self.opened += 1
        yield OpenFile(self, name)


class OpenFile:
    def __init__(self, store: OpeningStore, name: str) -> None:
        self._store, self._name = store, name

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._store.read_into(self._name, offset, buffer)


def test_chunks_of_one_file_are_read_while_it_is_open(tmp_path):
    store, expected = OpeningStore(), state()
    gpuckpt.save(tmp_path, expected, 1, codec="auto", store=store)
    arena = Resources("64 MiB").arena(["cpu"])
    entries = [one for one in open_step(store).tensors if one.spec.name.startswith("small")]
    wanted = [
        Wanted(Job(store, one, ()), one.chunks[0], [np.empty(one.spec.nbytes, np.uint8)])
        for one in entries
    ]
    store.opened = 0
    found = read_chunks(wanted, arena.take(), arena)
    assert store.opened == 1
    for one, taken in zip(wanted, found, strict=True):
        assert one.rooms[0].tobytes() == expected[one.job.entry.spec.name].tobytes()
        assert taken == one.chunk.fingerprint == fingerprint(one.rooms[0].data)


def test_a_file_that_ends_too_early_says_where(tmp_path):
    (tmp_path / "f").write_bytes(bytes(100))
    with LocalStore(tmp_path).open("f") as file:
        room = bytearray(11)
        with pytest.raises(CorruptError, match="ends at 100, 101 bytes expected"):
            file.read_into(90, memoryview(room))


def test_a_fingerprint_that_nobody_wants_is_not_taken(tmp_path):
    store = MemoryStore()
    gpuckpt.save(tmp_path, {"w": np.arange(9)}, 1, store=store)
    (entry,) = open_step(store).tensors
    arena = Resources("64 MiB").arena(["cpu"])
    job = Job(store, entry, ())
    wanted = Wanted(job, entry.chunks[0], [np.empty(72, np.uint8)], looked_at=False)
    assert read_chunks([wanted], arena.take(), arena) == [None]


@pytest.mark.parametrize("kind", [OpeningStore, MemoryStore])
def test_a_segment_is_read_part_by_part_whether_its_store_opens_files_or_not(kind):
    data = np.random.default_rng(3).bytes(2 * PART_NBYTES + 17)
    room = np.zeros(len(data), np.uint8)
    with segments.open_segment(kind({"s": b"header" + data}), "s") as reader:
        parts = [part.nbytes for part in reader.read(Extent("s", 6, len(data)), room)]
    assert room.tobytes() == data
    assert parts == [PART_NBYTES, PART_NBYTES, 17]


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
