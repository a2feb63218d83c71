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
from gpuckpt.conversion.npz import NPZ
from gpuckpt.conversion.placing import Reading, new_directory, new_file, path_of
from gpuckpt.conversion.safetensors import SAFETENSORS
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
            written(state, TARGETS[name], place / name, force=before, shard_nbytes=sharded(name))
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
            written(state, TORCH, place / "x.pt")
        struck, system.fault = system.fault.struck, Fault(-1)
        left = [path.name for path in place.iterdir()]
        assert left in ([], ["x.pt"]) or struck == "unlink"
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


def sharded(name: str) -> int | None:
    return 50_000 if name == "dir" else None


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
