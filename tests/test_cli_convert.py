"""`gpuckpt convert`, run as a person or a script would run it."""

from __future__ import annotations

import json

import numpy as np
import pytest

import gpuckpt
from tests.test_cli import run


@pytest.fixture
def root(tmp_path):
    gpuckpt.save(tmp_path / "run", {"a": {"w": np.arange(5.0)}, "lr": 0.5}, 7)
    return tmp_path / "run"


def test_it_says_what_was_converted_where(root, tmp_path):
    finished = run("convert", root, tmp_path / "x.safetensors", "--verify")

    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("1 tensor, 40 B, from ")
    assert "read back and compared" in finished.stdout
    assert finished.stderr == ""
    assert (tmp_path / "x.safetensors").is_file()


def test_as_json_it_tells_each_tensors_digest(root, tmp_path):
    finished = run("convert", root, tmp_path / "x.npz", "--json", "--step", 7)

    facts = json.loads(finished.stdout)
    assert facts["target_format"] == "npz"
    assert facts["step"] == 7
    assert facts["nbytes"] == 40
    (moved,) = facts["tensors"]
    assert (moved["name"], moved["dtype"], moved["shape"]) == ("a.w", "float64", [5])
    assert len(moved["digest"]) == 32
    assert facts["lost"] == []


def test_names_shards_and_formats_are_chosen(root, tmp_path):
    finished = run(
        *("convert", root, tmp_path / "dir", "--to", "safetensors"),
        *("--names", "a.*", "--shard-size", "1 MB", "--strict"),
    )
    assert finished.returncode == 0, finished.stderr
    assert [path.name for path in (tmp_path / "dir").iterdir()] == ["model.safetensors"]


def test_a_target_that_is_there_is_a_line_on_stderr_unless_forced(root, tmp_path):
    (tmp_path / "x.npz").write_bytes(b"")
    finished = run("convert", root, tmp_path / "x.npz")
    assert finished.returncode == 2
    assert "--force" in finished.stderr
    assert finished.stderr.count("\n") == 1
    assert run("convert", root, tmp_path / "x.npz", "--force").returncode == 0


def test_keys_are_read_from_files(root, tmp_path):
    (tmp_path / "key").write_bytes(b"k" * 32)
    sealed = run("convert", root, tmp_path / "sealed", "--target-key-file", tmp_path / "key")
    assert sealed.returncode == 0, sealed.stderr
    assert list(gpuckpt.load(tmp_path / "sealed", key=tmp_path / "key")) == ["a", "lr"]
    again = run("convert", tmp_path / "sealed", tmp_path / "y.npz", "--key-file", tmp_path / "key")
    assert again.returncode == 0, again.stderr


def test_singas_files_are_as_many_and_cut_as_is_said(tmp_path):
    gpuckpt.save(tmp_path / "run", {"w": np.arange(12, dtype="f4").reshape(2, 6)}, 7)
    options = ("--to", "singa", "--workers", "2", "--axis", "w=1")
    done = run("convert", tmp_path / "run", tmp_path / "singa", *options)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "singa").glob("*.bin"))) == 2
    back = run("convert", tmp_path / "singa", tmp_path / "back", "--axis", "w=1", "--json")
    facts = json.loads(back.stdout)
    assert facts["checked"] == 1
    assert facts["tensors"][0]["checked"] == "checksum"
    assert gpuckpt.load(tmp_path / "back")["w"].shape == (2, 6)
    wrong = run("convert", tmp_path / "singa", tmp_path / "x", "--axis", "w")
    assert wrong.returncode == 2
    assert "--axis is NAME=NUMBER" in wrong.stderr
    plain = run("convert", tmp_path / "singa", tmp_path / "x")
    assert plain.returncode == 2
    assert "--ignore-checksums" in plain.stderr
    assert run("convert", tmp_path / "singa", tmp_path / "x", "--ignore-checksums").returncode == 0


def test_a_source_of_no_format_is_a_line_on_stderr(tmp_path):
    finished = run("convert", tmp_path, tmp_path / "x.npz")
    assert finished.returncode == 2
    assert "nothing of a format" in finished.stderr
