"""`gpuckpt selftest`: it passes here, and fails where a file system doesn't do what it must."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gpuckpt
from gpuckpt.errors import InvalidError, StorageError
from gpuckpt.selftest import checkpoints, files, run
from gpuckpt.selftest.child import Child
from gpuckpt.selftest.mounts import judge_mount, mount_of
from gpuckpt.selftest.verdicts import failed, note, ok, recommendation
from gpuckpt.stores.local import LocalStore

TABLE = """\
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/vda rw
22 21 0:20 / /dev/shm rw,nosuid - tmpfs tmpfs rw
23 21 0:30 / /mnt/data rw,hard shared:2 - nfs4 server:/data rw,vers=4.2
24 23 0:31 / /mnt/data/fast\\040disk rw master:3 - xfs /dev/sdb rw,nobarrier
25 21 0:32 / /mnt/lustre rw - lustre 10.0.0.1@tcp:/fs rw,localflock
26 21 0:33 / /mnt/bucket rw - fuse.s3fs s3fs rw
nonsense
"""


def selftest(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gpuckpt", "selftest", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_passes_here_and_leaves_nothing(tmp_path):
    finished = selftest(tmp_path, "--size", "1 MiB", "--json")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    report = json.loads(finished.stdout)
    outcomes = {one["check"]: one["outcome"] for one in report["verdicts"]}
    assert set(outcomes) == {
        *("file system", "space", "rename", "sync", "direct writes"),
        *("lock", "kill and resume", "bit flips", "speed"),
    }
    assert set(outcomes.values()) <= {"ok", "note"}
    assert report["fit"]
    assert report["kept"] is None
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_not_there_is_named(tmp_path):
    finished = selftest(tmp_path / "nowhere")
    assert finished.returncode == 2
    assert "nowhere" in finished.stderr
    with pytest.raises(InvalidError, match="exists"):
        run.run_checks(tmp_path / "nowhere", 1 << 20)


def test_a_check_that_fails_keeps_its_files_and_the_others_still_run(tmp_path, monkeypatch):
    def broken(directory: Path) -> None:
        raise StorageError("the disk is gone")

    monkeypatch.setattr(run, "check_sync", broken)
    monkeypatch.setattr(run, "check_kills", lambda _: ok("kill and resume", ""))
    told: list = []
    report = run.run_checks(tmp_path, 1 << 20, told.append)
    assert told == list(report.verdicts)
    assert not report.fit
    assert [one.check for one in told if one.outcome == "FAILED"] == ["sync"]
    assert "the disk is gone" in told[3].found
    assert report.kept is not None
    assert Path(report.kept).parent == tmp_path
    assert "sync" in report.facts()["recommendation"]


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(directory: Path) -> None:
        (directory / "file").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "check_rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run_checks(tmp_path, 1 << 20)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me", "ext4"),
        ("/dev/shm", "tmpfs"),
        ("/dev/shmore", "ext4"),
        ("/mnt/data/runs", "nfs4"),
        ("/mnt/data/fast disk/run", "xfs"),
    ],
)
def test_a_directory_is_on_the_innermost_mount(path, kind):
    mount = mount_of(Path(path), TABLE)
    assert mount is not None
    assert mount.kind == kind


@pytest.mark.parametrize(
    ("path", "outcome", "word"),
    [
        ("/home", "ok", "ext4"),
        ("/dev/shm", "note", "reboot"),
        ("/mnt/data", "note", "hard"),
        ("/mnt/data/fast disk", "note", "power failure"),
        ("/mnt/lustre", "note", "other machines"),
        ("/mnt/bucket", "note", "server"),
    ],
)
def test_what_is_known_of_a_file_system_is_said(path, outcome, word, monkeypatch):
    monkeypatch.setattr(Path, "resolve", lambda self: self)
    verdict = judge_mount(Path(path), TABLE)
    assert verdict.outcome == outcome
    assert word in verdict.found + verdict.advice


def test_without_a_table_the_file_system_is_unknown(tmp_path):
    assert judge_mount(tmp_path, "").outcome == "note"


def test_a_disk_that_is_nearly_full_is_noted(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert files.check_space(tmp_path).outcome == "note"


def test_a_rename_that_is_a_copy_fails(tmp_path, monkeypatch):
    def copy(self: LocalStore, old: str, new: str) -> None:
        data = Path(self.root, old).read_bytes()
        with Path(self.root, new).open("wb") as file:
            for at in range(0, len(data), 4096):
                file.write(data[at : at + 4096])
                file.flush()

    monkeypatch.setattr(LocalStore, "rename", copy)
    assert files.check_rename(tmp_path).outcome == "FAILED"


def test_syncs_that_cannot_have_reached_a_disk_are_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "write_all", lambda *_: None)
    monkeypatch.setattr(LocalStore, "sync_names", lambda _: None)
    assert files.check_sync(tmp_path).outcome == "note"


def test_other_bytes_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "read_all", lambda *_: b"")
    assert files.check_direct(tmp_path).outcome == "FAILED"


def test_a_file_system_without_direct_writes_is_noted(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(22, "not here")

    monkeypatch.setattr("gpuckpt.stores.local.DirectFile", refuse)
    assert files.check_direct(tmp_path).outcome == "note"


def test_a_lock_that_excludes_nobody_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert files.check_lock(tmp_path).outcome == "FAILED"


def test_a_lock_that_outlives_its_owner_fails(tmp_path, monkeypatch):
    class Stubborn(Child):
        """Dies only the second time."""

        times = 0

        def kill(self) -> str:
            self.times += 1
            return super().kill() if self.times > 1 else ""

    monkeypatch.setattr(files, "LOCK_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(files, "Child", Stubborn)
    verdict = files.check_lock(tmp_path)
    assert verdict.outcome == "FAILED"
    assert "death" in verdict.found


@pytest.mark.parametrize("step", [0, 10**6])
def test_a_resume_at_an_older_step_or_with_other_bytes_fails(tmp_path, monkeypatch, step):
    monkeypatch.setattr(gpuckpt.Checkpointer, "resume", lambda *_: step)
    assert checkpoints.check_kills(tmp_path, kills=1).outcome == "FAILED"


def test_a_flipped_bit_that_nobody_finds_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "verify_step", lambda *_: [])
    assert "unnoticed" in checkpoints.check_flips(tmp_path, flips=1).found


def test_bytes_that_cannot_be_put_back_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "verify_step", lambda *_: ["damage"])
    assert checkpoints.check_flips(tmp_path, flips=1).outcome == "FAILED"


def test_a_child_that_says_nothing_is_an_error(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with Child("hold", os.fspath(path)) as child, pytest.raises(StorageError, match="ended"):
        child.hear()


def test_the_recommendation_names_what_failed_before_what_is_noted():
    good, odd, bad = ok("a", ""), note("b", "", ""), failed("c", "", "")
    assert recommendation([good]).endswith("can be seen.")
    assert "b" in recommendation([good, odd])
    assert recommendation([good, odd, bad]) == "Don't keep checkpoints here: c failed."
