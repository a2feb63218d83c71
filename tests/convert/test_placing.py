"""Targets appear whole or not at all: after crashes, on disks that fail, and when interrupted."""

from __future__ import annotations

import _thread
import contextlib
import errno
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import gpuckpt
from gpuckpt.conversion.feed import Feed
from gpuckpt.conversion.npz import NPZ
from gpuckpt.conversion.placing import Reading, new_directory, new_file, path_of
from gpuckpt.conversion.port import Format, Options, Source
from gpuckpt.conversion.safetensors import SAFETENSORS
from gpuckpt.conversion.standing import standing
from gpuckpt.conversion.states import StateSource
from gpuckpt.errors import InvalidError, NotFoundError
from gpuckpt.stores.local import LocalAppender, LocalStore
from tests.convert.states import read, training_state, written
from tests.crash_store import CrashStore, losses, syncs
from tests.failing_disks import Fault, System
from tests.strategies import same

DATA = b"the whole of it"


def replaced_file() -> CrashStore:
    """A file is written in the place of another one, in two parts; then it is promised."""
    store = CrashStore((("x", b"old"),))
    with (
        mock.patch("gpuckpt.conversion.placing.LocalStore", return_value=store),
        new_file(Path("/nowhere/x"), force=True) as file,
    ):
        file.append([DATA[:5]])
        file.append([DATA[5:]])
    store.promise(frozenset({(1, 1)}))
    return store


def found_after(store: CrashStore, deaf: int | None = None) -> set[tuple[bytes | None, bool]]:
    """What is at the file's name after each loss of power, and whether it was promised."""
    every = losses(store.record, image=(("x", b"old"),), deaf=deaf)
    return {(dict(loss.image).get("x"), bool(loss.promise)) for loss in every}


def test_a_loss_of_power_leaves_the_old_file_or_the_new_one_and_the_new_one_once_it_is_told():
    assert found_after(replaced_file()) == {(b"old", False), (DATA, False), (DATA, True)}


def test_each_sync_is_needed():
    store = replaced_file()
    known = list(syncs(store.record, image=(("x", b"old"),)))
    assert len(known) == 2
    for deaf in known:
        assert found_after(store, deaf) - {(b"old", False), (DATA, False), (DATA, True)}


def test_a_directory_is_synced_with_all_in_it_before_it_gets_its_name(tmp_path, monkeypatch):
    system = System(tmp_path, monkeypatch)
    rename = Path.rename

    def noted(path: Path, target: Path) -> Path:
        system.calls.append("rename")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", noted)
    with new_directory(tmp_path / "dir", force=False) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a").write_bytes(b"1")
        (folder / "b").write_bytes(b"2")
        system.calls.clear()
    calls = [call for call in system.calls if call in ("fsync", "rename")]
    assert calls == [*["fsync"] * 4, "rename", "fsync"]


TARGETS = {"x.safetensors": SAFETENSORS, "x.npz": NPZ, "dir": SAFETENSORS}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("before", [False, True])
def test_whatever_call_of_the_system_fails_no_half_target_stays(
    name, before, tmp_path, monkeypatch
):
    place = tmp_path / "place"
    state, old = training_state(), {"old": np.zeros(1)}
    system = System(place, monkeypatch)
    failed = 0
    for at in range(1000):
        place.mkdir()
        if before:
            written(old, TARGETS[name], place / name)
        system.fault = Fault(at, errno.ENOSPC)
        try:
            feed = Feed(StateSource(state))
            options = {"force": before, "shard_nbytes": sharded(name), "checksums": feed.checksums}
            put(TARGETS[name], place / name, feed, options)
        except gpuckpt.CheckpointError as error:
            assert isinstance(error, gpuckpt.StorageError), error  # noqa: PT017
            failed += 1
        struck, system.fault = system.fault.struck, Fault(-1)
        left = sorted(path.name for path in place.iterdir())
        others = [one for one in left if one != name]
        # What can't be removed stays, under a name of its own.
        assert not others or (before and name == "dir" and others[0].endswith(".partial"))
        if name in left:
            assert same(read(place / name, TARGETS[name]), state) or (
                before and same(read(place / name, TARGETS[name]), old)
            )
        clear(place)
        if not struck:
            assert left
            break
    assert failed > 5


def test_whatever_call_of_the_system_fails_torch_leaves_no_half_file(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="torch isn't installed")
    from gpuckpt.conversion.torch_file import TORCH

    place, state = tmp_path / "place", {"w": np.arange(9.0), "n": 1}
    system = System(place, monkeypatch)
    for at in range(100):
        place.mkdir()
        system.fault = Fault(at, errno.ENOSPC)
        with contextlib.suppress(gpuckpt.StorageError):
            feed = Feed(StateSource(state))
            put(TORCH, place / "x.pt", feed, {"checksums": feed.checksums})
        struck, system.fault = system.fault.struck, Fault(-1)
        left = [path.name for path in place.iterdir()]
        beside = ["x.pt", "x.pt.checksums.json"]
        assert sorted(left) in ([], beside[:1], beside) or struck == "unlink"
        if "x.pt" in left:
            assert same(read(place / "x.pt", TORCH), state)
        clear(place)
        if not struck:
            break
    assert at > 15


def test_a_write_that_fails_once_under_torchs_writer_is_told(tmp_path):
    pytest.importorskip("torch", reason="torch isn't installed")
    from gpuckpt.conversion.torch_file import TORCH

    append, calls = LocalAppender.append, []

    def fails_once(file: LocalAppender, parts: Any) -> None:
        calls.append(sum(map(len, parts)))
        if len(calls) == 6:
            raise gpuckpt.StorageError("can't write: a moment's trouble")
        append(file, parts)

    with (
        mock.patch.object(LocalAppender, "append", fails_once),
        pytest.raises(gpuckpt.StorageError, match="a moment's trouble"),
    ):
        written({"w": np.arange(9.0), "n": 1}, TORCH, tmp_path / "x.pt")
    assert len(calls) == 6
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cant_get_its_name_leaves_the_one_before(tmp_path, monkeypatch):
    rename = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial") and (path / "new").exists():
            raise OSError(errno.EIO, "the disk reports an error")
        return rename(path, target)

    def replace() -> None:
        with new_directory(tmp_path / "dir", force=True) as folder:
            (folder / "new").touch()

    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "old").touch()
    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(gpuckpt.StorageError, match="rename"):
        replace()
    assert [path.name for path in tmp_path.rglob("*")] == ["dir", "old"]


def moved_with(monkeypatch: pytest.MonkeyPatch, then: Any) -> None:
    """When a folder has been moved aside, something happens to it before anybody looks again."""
    rename = Path.rename

    def noted(path: Path, target: Path) -> Path:
        moved = rename(path, target)
        if target.name.endswith(".partial"):
            then(target)
        return moved

    monkeypatch.setattr(Path, "rename", noted)


def an_export(tmp_path: Path) -> Path:
    """A directory of safetensors, and a root to put in its place."""
    gpuckpt.save(tmp_path / "run", {"w": np.ones(3)})
    gpuckpt.convert(tmp_path / "run", tmp_path / "dir", to="safetensors")
    return tmp_path / "dir"


@pytest.mark.parametrize("when", ["while it is written", "while it is moved aside"])
def test_a_directory_that_got_something_meanwhile_isnt_replaced(tmp_path, monkeypatch, when):
    old = an_export(tmp_path)
    before = (old / "model.safetensors").read_bytes()

    def write(folder: Path) -> None:
        (folder / "notes.txt").write_text("precious")

    def progress(*_: object) -> None:
        write(old)

    if when == "while it is moved aside":
        moved_with(monkeypatch, write)
        progress = lambda *_: None  # noqa: E731
    with pytest.raises(InvalidError, match=r"dir has changed since .*: notes\.txt; nothing is"):
        gpuckpt.convert(tmp_path / "run", old, to="safetensors", force=True, progress=progress)
    assert (old / "notes.txt").read_text() == "precious"
    assert (old / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dir", "run"]


def test_another_checkpoint_that_was_written_there_meanwhile_isnt_replaced(tmp_path):
    old = an_export(tmp_path)
    gpuckpt.save(tmp_path / "other", {"theirs": np.zeros(2)})

    def progress(*_: object) -> None:
        gpuckpt.convert(tmp_path / "other", old, to="safetensors", force=True)

    with pytest.raises(InvalidError, match=r"dir has changed since"):
        gpuckpt.convert(tmp_path / "run", old, to="safetensors", force=True, progress=progress)
    assert list(read(old, SAFETENSORS)) == ["theirs"]


def test_what_came_into_a_directory_after_the_last_look_is_not_deleted(
    tmp_path, monkeypatch, caplog
):
    old, rename = an_export(tmp_path), Path.rename

    def late(path: Path, target: Path) -> Path:
        if target == old:  # the new one gets its name: somebody writes into the one before
            (aside,) = (one for one in tmp_path.glob(".dir.*") if one != path)
            (aside / "notes.txt").write_text("precious")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    gpuckpt.convert(tmp_path / "run", old, to="safetensors", force=True)
    (aside,) = tmp_path.glob(".dir.*")
    assert [(path.name, path.read_text()) for path in aside.iterdir()] == [
        ("notes.txt", "precious")
    ]
    assert "isn't all deleted" in caplog.text


def test_a_file_that_changed_meanwhile_isnt_replaced(tmp_path):
    gpuckpt.save(tmp_path / "run", {"w": np.ones(3)})
    path = tmp_path / "x.npz"
    path.write_bytes(b"old")

    with pytest.raises(InvalidError, match=r"x\.npz has changed since it was seen"):
        gpuckpt.convert(
            tmp_path / "run", path, force=True, progress=lambda *_: path.write_bytes(b"theirs")
        )
    assert path.read_bytes() == b"theirs"
    path.unlink()
    with pytest.raises(InvalidError, match=r"x\.npz has changed since it was seen"):
        gpuckpt.convert(
            tmp_path / "run", path, force=True, progress=lambda *_: path.write_bytes(b"came")
        )
    assert path.read_bytes() == b"came"


def test_only_what_was_seen_is_deleted(tmp_path):
    (tmp_path / "x" / "deep" / "er").mkdir(parents=True)
    for name in ("a", "deep/b", "deep/er/c"):
        (tmp_path / "x" / name).write_text(name)
    (tmp_path / "x" / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "kept").write_text("kept")
    seen = standing(tmp_path / "x")
    assert sorted(seen.entries) == [".", "a", "deep", "deep/b", "deep/er", "deep/er/c", "link"]
    (tmp_path / "x" / "deep" / "b").write_text("changed")
    (tmp_path / "x" / "deep" / "new").write_text("new")

    assert not seen.delete(tmp_path / "x")

    left = {str(path.relative_to(tmp_path / "x")) for path in (tmp_path / "x").rglob("*")}
    assert left == {"deep", "deep/b", "deep/new"}
    assert (tmp_path / "kept").read_text() == "kept"
    assert standing(tmp_path / "x").delete(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert standing(tmp_path / "x").entries == {}


def sharded(name: str) -> int | None:
    return 50_000 if name == "dir" else None


def put(to: Format, path: Path, source: Source, options: dict[str, Any]) -> None:
    """Write a source, as a conversion does."""
    assert to.write is not None
    to.write(str(path), source, Options(**options))


def clear(place: Path) -> None:
    for path in sorted(place.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    place.rmdir()


@pytest.mark.parametrize("name", ["x.safetensors", "x.npz", "dir", "x.pt", "run"])
def test_an_interrupt_leaves_no_target(name, tmp_path):
    if name == "x.pt":
        pytest.importorskip("torch", reason="torch isn't installed")
    gpuckpt.save(tmp_path / "source", training_state())
    told: list[int] = []

    def interrupt(_what: str, nbytes: int, _total: int) -> None:
        if not told:
            _thread.interrupt_main()
            time.sleep(0.3)  # until the main thread has seen it
        told.append(nbytes)

    to = "safetensors" if name == "dir" else None
    with pytest.raises(KeyboardInterrupt):
        gpuckpt.convert(tmp_path / "source", tmp_path / name, to=to, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert len(told) == 1


def test_a_new_root_that_failed_is_gone_and_an_old_one_keeps_its_steps(tmp_path):
    gpuckpt.save(tmp_path / "source", training_state(), 5)
    gpuckpt.save(tmp_path / "old", {"w": np.zeros(1)}, 1)
    create = LocalStore.create

    def full(store: LocalStore, name: str) -> Any:
        if name.endswith(".segment"):
            raise gpuckpt.StorageError(f"can't create {name}: the disk is full")
        return create(store, name)

    with mock.patch.object(LocalStore, "create", full):
        for name in ("new", "old"):
            with pytest.raises(gpuckpt.StorageError):
                gpuckpt.convert(tmp_path / "source", tmp_path / name)
    assert not (tmp_path / "new").exists()
    assert list(gpuckpt.load(tmp_path / "old")) == ["w"]


def test_a_target_that_came_meanwhile_isnt_replaced(tmp_path):
    def race() -> None:
        with new_file(tmp_path / "x", force=False) as file:
            file.append([b"ours"])
            (tmp_path / "x").write_bytes(b"theirs")

    with pytest.raises(InvalidError, match="force"):
        race()
    assert (tmp_path / "x").read_bytes() == b"theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_file_of_a_store_is_read_from_anywhere(tmp_path):
    (tmp_path / "x").write_bytes(DATA)
    file = Reading(LocalStore(tmp_path), "x")

    assert file.read(3) == DATA[:3]
    assert file.seek(-4, 2) == len(DATA) - 4
    assert file.read() == DATA[-4:]
    assert file.read(1) == b""
    assert file.seek(-2, 1) == len(DATA) - 2
    assert file.seek(100) == 100
    assert file.read(1) == b""


def test_paths_and_links_and_urls_of_this_machine_are_one_place(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(DATA)
    (tmp_path / "link").symlink_to("x")
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in (f"{tmp_path}/x", f"file://{tmp_path}/x", f"{tmp_path}/link", "~/x"):
        assert path_of(place) == tmp_path / "x"
    with pytest.raises(InvalidError, match="this machine"):
        path_of("s3://bucket/x")
    with pytest.raises(NotFoundError, match="no such file"):
        gpuckpt.convert(tmp_path / "missing.npz", tmp_path / "run")
