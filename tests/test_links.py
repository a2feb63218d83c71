"""Links, pipes and devices where a file belongs, and the modes of those that are made."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuckpt
from gpuckpt.errors import StorageError
from gpuckpt.journal import read_journal
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.regular import open_file

STATE: dict[str, Any] = {"w": np.arange(5000.0), "n": 3}


@pytest.fixture(name="root")
def saved(tmp_path: Path) -> Path:
    gpuckpt.save(tmp_path / "root", STATE, 7)
    return tmp_path / "root"


def only(root: Path, ending: str) -> Path:
    (found,) = root.glob(f"*{ending}")
    return found


def link(path: Path) -> None:
    shutil.move(path, path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("no-such-file")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def listener(path: Path) -> None:
    path.unlink()
    # From there: a socket's name has 108 bytes at most.
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)


ODD = [link, dangle, pipe, device, listener]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("ending", [".manifest.json", ".segment"])
def test_what_is_no_file_is_refused_at_once_and_by_name(odd, ending, root):
    path = only(root, ending)
    odd(path)
    with pytest.raises(StorageError, match=f"{path.name} is a link, a pipe"):
        gpuckpt.load(root)


@pytest.mark.parametrize("odd", ODD)
def test_a_lock_that_is_no_file_is_refused_and_what_it_leads_to_stays(odd, root, tmp_path):
    (root / "elsewhere").write_text("mine")
    shutil.copy(root / "elsewhere", root / "lock")
    odd(root / "lock")
    with pytest.raises(StorageError, match="lock is a link, a pipe"):
        gpuckpt.Checkpointer(root)
    assert (root / "elsewhere").read_text() == "mine"


def test_a_lock_that_leads_to_a_file_of_mine_truncates_nothing(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "lock").symlink_to(tmp_path / "mine")
    with pytest.raises(StorageError):
        gpuckpt.save(tmp_path / "root", STATE)
    (tmp_path / "root" / "lock").unlink()
    (tmp_path / "root" / "lock").hardlink_to(tmp_path / "mine")
    gpuckpt.save(tmp_path / "root", STATE)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_root_s_directory_may_be_a_link(root, tmp_path):
    (tmp_path / "latest").symlink_to("root")
    gpuckpt.save(tmp_path / "latest", {"w": STATE["w"] + 1}, 8)
    assert LocalStore(root).names() == LocalStore(tmp_path / "latest").names()
    assert gpuckpt.load(tmp_path / "latest")["w"][0] == 1


def test_a_user_may_name_one_data_file_by_a_link(root, tmp_path):
    (tmp_path / "best").symlink_to(only(root, ".segment"))
    assert gpuckpt.load(tmp_path / "best")["w"].tolist() == STATE["w"].tolist()


@pytest.mark.parametrize("ending", [".tmp", ""])
def test_a_link_in_the_place_of_a_new_manifest_is_replaced_not_followed(ending, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "root").mkdir()
    name = f"step-000000000007.manifest.json{ending}"
    (tmp_path / "root" / name).symlink_to(tmp_path / "mine")
    gpuckpt.save(tmp_path / "root", STATE, 7)
    assert (tmp_path / "mine").read_text() == "mine"
    assert not only(tmp_path / "root", ".manifest.json").is_symlink()
    assert gpuckpt.load(tmp_path / "root")["n"] == 3


def test_a_segment_is_never_written_over_anything(tmp_path):
    store = LocalStore(tmp_path)
    (tmp_path / "mine").write_text("mine")
    for name, make in (("a", Path.symlink_to), ("b", Path.hardlink_to)):
        make(tmp_path / name, tmp_path / "mine")
        with pytest.raises(StorageError):
            store.create(name)
    assert (tmp_path / "mine").read_text() == "mine"


def test_hard_links_are_files_and_a_copy_by_them_outlives_the_root(root, tmp_path):
    shutil.copytree(root, tmp_path / "copy", copy_function=os.link)
    with gpuckpt.Checkpointer(root, keep=gpuckpt.Keep(last=1)) as ckpt:
        ckpt.save(8, {"w": STATE["w"] + 1, "n": 4}).result()
    assert gpuckpt.load(root)["n"] == 4
    assert gpuckpt.load(tmp_path / "copy")["w"].tolist() == STATE["w"].tolist()


def test_sweeping_removes_a_link_and_not_what_it_leads_to(root, tmp_path):
    (tmp_path / "mine").write_text("mine")
    left = root / "step-000000000003.00000000.r0.0.segment"
    left.symlink_to(tmp_path / "mine")
    gpuckpt.Checkpointer(root).close()
    assert not left.is_symlink()
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("odd", [dangle, pipe, device])
def test_a_log_in_a_root_that_is_no_file_fails_no_save_and_hangs_nobody(odd, root, caplog):
    (root / "saves.jsonl").touch()
    odd(root / "saves.jsonl")
    with gpuckpt.Checkpointer(root, log=True) as ckpt:
        ckpt.save(9, STATE).result()
    assert "isn't in the log" in caplog.text
    with pytest.raises(StorageError, match="is a link, a pipe"):
        read_journal(root)


def test_a_log_that_a_user_names_by_a_link_is_written(root, tmp_path):
    (tmp_path / "log").symlink_to("log-of-today")
    with gpuckpt.Checkpointer(root, log=tmp_path / "log") as ckpt:
        ckpt.save(9, STATE).result()
    assert [one.stats.step for one in read_journal(tmp_path / "log-of-today")] == [9]


def test_a_directory_where_a_file_belongs_is_refused(tmp_path):
    with pytest.raises(StorageError, match="is a link, a pipe, a device or a directory"):
        open_file(tmp_path, os.O_RDONLY)
    (tmp_path / "lock").mkdir()
    with pytest.raises(StorageError, match="lock is a link, a pipe"):
        gpuckpt.Checkpointer(tmp_path)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_are_what_the_umask_leaves(mask, tmp_path):
    before = os.umask(mask)
    try:
        with gpuckpt.Checkpointer(tmp_path / "new" / "root", log=True) as ckpt:
            ckpt.save(1, STATE).result()
    finally:
        os.umask(before)
    files = sorted((tmp_path / "new" / "root").iterdir())
    assert len(files) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}
    made = [tmp_path / "new", tmp_path / "new" / "root"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o777 & ~mask}
