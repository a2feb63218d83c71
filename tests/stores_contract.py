"""What every `Store` promises: each store's tests inherit these."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest

import gpuckpt
from gpuckpt import layout
from gpuckpt.commit import commit, delete, open_step, steps, sweep
from gpuckpt.errors import CorruptError, LockedError, NotFoundError, StorageError
from gpuckpt.manifest import Manifest, pack_manifest, unpack_manifest
from gpuckpt.resources import Resources
from gpuckpt.spec import ChunkEntry, Extent, Plane, Spec
from gpuckpt.stores import Store, read_all, remove_all, write_all
from gpuckpt.tensors import TensorEntry
from gpuckpt.verify import verify_step


def small_manifest() -> bytes:
    extent = Extent(layout.segment_name(3, "01234567", 0, 0), 64, 8)
    planes = (Plane("raw", 8),)
    chunk = ChunkEntry(0, 8, extent, "0" * 32, "1" * 16, planes)
    tensor = TensorEntry(Spec("a", "int64", (1,)), (chunk,), 3)
    return pack_manifest(Manifest(3, {"dict": [["a", {"tensor": 0}]]}, (tensor,)))


def writer_that_must_not_fail() -> None:
    raise AssertionError("the commit failed")


class StoreContract:
    """Tests of any store; a fixture `store` gives an empty one, `again` another of its root."""

    def test_files_are_made_read_and_removed(self, store: Store):
        with store.lock():
            file = store.create("f")
            file.append([b"ab", memoryview(b""), memoryview(b"cd")])
            file.append([])
            assert file.offset == 4
            file.sync()
            file.close()
            file.close()
            with pytest.raises(StorageError, match="f"):
                store.create("f")
        assert read_all(store, "f") == b"abcd"
        assert store.size("f") == 4
        write_all(store, "g", b"new")
        assert set(store.names()) - {layout.LOCK} == {"f", "g"}
        store.remove("f")
        store.remove("f")
        store.sync_names()
        for call in (lambda: store.size("f"), lambda: read_all(store, "f")):
            with pytest.raises(NotFoundError, match="f"):
                call()

    def test_what_is_published_replaces_what_is_there(self, store: Store):
        write_all(store, "f", b"old")
        if hasattr(store, "publish"):
            store.publish("f", b"new")
            store.publish("h", b"first")
            assert read_all(store, "h") == b"first"
        else:
            write_all(store, "g", b"new")
            store.rename("g", "f")  # type: ignore[attr-defined]
            assert "g" not in store.names()
            with pytest.raises(NotFoundError):
                store.rename("g", "f")  # type: ignore[attr-defined]
        assert read_all(store, "f") == b"new"

    def test_a_file_is_read_from_any_offset_and_not_beyond_its_end(self, store: Store):
        data = os.urandom(1000)
        write_all(store, "f", data)
        for offset, length in ((0, 1000), (1, 998), (999, 1), (500, 0)):
            room = bytearray(length)
            store.read_into("f", offset, memoryview(room))
            assert bytes(room) == data[offset : offset + length]
        for offset, length in ((0, 1001), (999, 2), (1000, 1), (5000, 10)):
            with pytest.raises(CorruptError, match="ends at"):
                store.read_into("f", offset, memoryview(bytearray(length)))

    def test_an_empty_file_is_a_file(self, store: Store):
        write_all(store, "f", b"")
        assert store.size("f") == 0
        assert read_all(store, "f") == b""

    def test_what_is_appended_piece_by_piece_is_there_in_its_order(self, store: Store):
        """With pieces that end in the middle of parts, at their ends, and after several."""
        random_ = random.Random(1)
        sizes = [1, 65_535, 1, 65_536, 200_000, 0, 131_072, 70_000, 5]
        pieces = [random_.randbytes(size) for size in sizes]
        file = store.create("f")
        memory = bytearray(max(sizes))
        for piece in pieces:
            memory[: len(piece)] = piece
            file.append([memoryview(memory)[: len(piece)]])  # it is ours again on return
        file.sync()
        file.close()
        assert read_all(store, "f") == b"".join(pieces)

    def test_a_committed_manifest_is_opened_as_it_was(self, store: Store):
        manifest = unpack_manifest(small_manifest(), "m")
        assert steps(store) == []
        with pytest.raises(NotFoundError, match="no committed checkpoint"):
            open_step(store)
        write_all(store, manifest.segments[0], b"data")
        commit(store, manifest, abandon=writer_that_must_not_fail)
        assert steps(store) == [3]
        assert open_step(store) == open_step(store, 3) == manifest
        with pytest.raises(NotFoundError, match=r"step 4 .* 3$"):
            open_step(store, 4)
        assert not [name for name in store.names() if name.endswith(layout.TEMPORARY)]

    def test_a_manifest_under_another_steps_name_is_corrupt(self, store: Store):
        write_all(store, layout.manifest_name(4), small_manifest())
        with pytest.raises(CorruptError, match="step 3"):
            open_step(store, 4)

    def test_many_files_are_removed_at_once_and_no_others(self, store: Store):
        names = [f"f{number}" for number in range(40)]
        for name in names:
            write_all(store, name, b"x")
        remove_all(store, [*names[::2], "never-there"])
        assert [name for name in store.names() if name.startswith("f")] == sorted(names[1::2])
        remove_all(store, [])
        remove_all(store, names[1::2])
        assert not [name for name in store.names() if name.startswith("f")]

    def test_a_sweep_removes_what_no_manifest_names_and_nothing_else(self, store: Store):
        manifest = unpack_manifest(small_manifest(), "m")
        litter = [
            layout.segment_name(3, "ffffffff", 0, 0),
            layout.segment_name(9, "01234567", 0, 0),
            layout.manifest_name(5) + layout.TEMPORARY,
        ]
        for name in (*litter, manifest.segments[0], "notes.txt", "other.tmp"):
            write_all(store, name, b"x")
        commit(store, manifest, abandon=writer_that_must_not_fail)
        assert sorted(sweep(store)) == sorted(litter)
        names = {*manifest.segments, layout.manifest_name(3), "notes.txt", "other.tmp"}
        assert set(store.names()) == names
        delete(store, [3])
        assert set(store.names()) == {"notes.txt", "other.tmp"}

    def test_while_a_manifest_cannot_be_read_no_segment_is_swept_away(self, store: Store):
        write_all(store, layout.manifest_name(1), b"damaged")
        segment = layout.segment_name(1, "01234567", 0, 0)
        write_all(store, segment, b"x")
        assert sweep(store) == []
        assert segment in store.names()

    def test_one_writer_at_a_time_has_the_lock(self, store: Store, again: Store):
        for _ in range(2):
            with store.lock():
                with pytest.raises(LockedError), again.lock():
                    pass
                with pytest.raises(LockedError), again.lock():
                    pass
        with again.lock(), pytest.raises(LockedError), store.lock():
            pass

    def test_a_run_saves_deletes_and_goes_on(self, store: Store, again: Store):
        """With segments of several parts, chunks that haven't changed, and steps replaced."""
        rng = np.random.default_rng(1)
        numbers = rng.standard_normal(60_000).astype("f4")
        state: dict[str, Any] = {"w": numbers, "frozen": rng.bytes(9), "n": 0}
        with gpuckpt.Checkpointer("", store=store, keep=gpuckpt.Keep(last=2)) as ckpt:
            for step in (1, 2, 3, 3, 4):
                state["w"][step] = state["n"] = step
                ckpt.save(step, state).result()
            assert ckpt.steps() == [3, 4]
        found = {"w": np.zeros(60_000, "f4"), "frozen": b"", "n": 0}
        with gpuckpt.Checkpointer("", store=again) as ckpt:
            assert ckpt.resume(found) == 4
        assert found["n"] == 4
        assert found["frozen"] == state["frozen"]
        np.testing.assert_array_equal(found["w"], state["w"])
        for step in (3, 4):
            assert verify_step(again, step, Resources("64 MiB")) == []
