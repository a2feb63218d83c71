"""The command line, run as a person or a script would run it."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest

import gpuckpt
from gpuckpt.cli import main

Finished = subprocess.CompletedProcess[str]


def run(*arguments: object) -> Finished:
    """In this process: what is printed, and what it would exit with."""
    out, err, code = io.StringIO(), io.StringIO(), None
    argv = ["gpuckpt", *map(str, arguments)]
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", argv),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
    assert code is None or isinstance(code, int)
    return Finished(argv, code or 0, out.getvalue(), err.getvalue())


def run_alone(*arguments: object) -> Finished:
    """In a process of its own."""
    command = [sys.executable, "-m", "gpuckpt", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def root(tmp_path):
    weights = np.random.default_rng(0).standard_normal((200, 100)).astype(np.float32)
    for step in (3, 7):
        state = {"layers": [{"w": weights + step, "name": "x\x1b[31m [red]"}], "frozen": weights}
        gpuckpt.save(tmp_path, state, step, epoch=1, metrics={"loss": float("nan"), "acc": 0.5})
    return tmp_path


def test_ls_lists_steps_with_sizes_and_metrics(root):
    finished = run("ls", root)

    assert finished.returncode == 0
    assert "3" in finished.stdout
    assert "acc=0.5" in finished.stdout
    facts = json.loads(run("ls", root, "--json").stdout)
    assert [row["step"] for row in facts["checkpoints"]] == [3, 7]
    assert facts["checkpoints"][0]["metrics"] == {"loss": "nan", "acc": 0.5}
    assert "in older" not in finished.stdout
    assert "deltas" not in finished.stdout
    assert facts["checkpoints"][0]["raw_nbytes"] == 2 * 200 * 100 * 4


def test_show_shows_every_leaf_and_nothing_that_a_terminal_would_obey(root):
    finished = run("show", root, "--step", 7)

    assert finished.returncode == 0
    assert "layers.0.w" in finished.stdout
    assert "\x1b[31m" not in finished.stdout
    assert "[red]" in finished.stdout
    facts = json.loads(run("show", root, "--json").stdout)
    versions = {leaf["name"]: leaf.get("version") for leaf in facts["leaves"]}
    assert versions == {"layers.0.w": 7, "layers.0.name": None, "frozen": 3}


def test_show_picks_names_by_glob(root):
    facts = json.loads(run("show", root, "--names", "layers.*.w", "--json").stdout)
    assert [leaf["name"] for leaf in facts["leaves"]] == ["layers.0.w"]


@pytest.fixture
def increments(tmp_path):
    """Step 2 is a delta and a tensor that has not changed."""
    rng = np.random.default_rng(0)
    state = {name: rng.standard_normal((256, 256)).astype(np.float32) for name in ("w", "frozen")}
    with gpuckpt.Checkpointer(tmp_path, codec="delta", memory="64 MiB") as ckpt:
        ckpt.save(1, state).result(60)
        with ckpt.update():
            state["w"].reshape(-1).view("u4")[::5] += 1
        ckpt.save(2, state).result(60)
    return tmp_path


def test_ls_and_show_say_what_older_files_hold_of_a_step(increments):
    first, second = json.loads(run("ls", increments, "--json").stdout)["checkpoints"]
    assert (first["older_nbytes"], first["delta_nbytes"], first["base_nbytes"]) == (0, 0, 0)
    frozen, delta = first["encoded_nbytes"] / 2, 256 * 256 * 4
    assert second["older_nbytes"] == pytest.approx(frozen, rel=0.02)
    assert second["delta_nbytes"] == delta
    assert second["base_nbytes"] == first["encoded_nbytes"] - second["older_nbytes"]
    assert second["encoded_nbytes"] - second["older_nbytes"] < frozen / 4

    shown = json.loads(run("show", increments, "--json").stdout)
    leaves = {leaf["name"]: leaf for leaf in shown["leaves"]}
    keys = ("older_nbytes", "delta_nbytes", "base_nbytes")
    assert all(shown[key] == second[key] for key in keys)
    assert all(sum(leaf[key] for leaf in leaves.values()) == second[key] for key in keys)
    assert leaves["frozen"]["older_nbytes"] == second["older_nbytes"]
    assert leaves["w"]["delta_nbytes"] == delta

    older = f"{second['older_nbytes'] / 1024:.1f} KiB"
    head, *lines = run("ls", increments).stdout.splitlines()
    assert ("in older" in head, "deltas" in head) == (True, True)
    assert older not in lines[0]
    assert older in lines[1]
    assert "50 %" in lines[1]
    last = run("show", increments).stdout.splitlines()[-1]
    assert f", {older} of it in older segments, ratio" in last
    assert "; 50 % deltas, whose bases are" in last
    assert "older" not in run("show", increments, "--step", 1).stdout


def test_verify_finds_one_wrong_byte_and_names_tensor_file_and_offset(root):
    assert run("verify", root).returncode == 0
    (segment,) = root.glob("step-000000000007.*.segment")
    data = bytearray(segment.read_bytes())
    data[1000] ^= 1
    segment.write_bytes(data)

    finished = run("verify", root)

    assert finished.returncode == 1
    line = next(line for line in finished.stdout.splitlines() if "DAMAGED" in line)
    assert "step 7" in line
    assert "layers.0.w" in line
    assert segment.name in line
    assert "offset 64" in line
    assert run("verify", root, "--step", 3).returncode == 0
    facts = json.loads(run("verify", root, "--json").stdout)
    assert not facts["intact"]
    assert [len(row["damage"]) for row in facts["steps"]] == [0, 1]


def test_verify_finds_a_damaged_index_a_missing_segment_and_a_damaged_manifest(root):
    (segment,) = root.glob("step-000000000007.*.segment")
    data = segment.read_bytes()
    segment.write_bytes(data[:-70] + bytes([data[-70] ^ 8]) + data[-69:])
    assert run("verify", root, "--step", 7).returncode == 1
    segment.unlink()
    assert "there is no such file" in run("verify", root, "--step", 7).stdout
    manifest = root / "step-000000000007.manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"frozen", b"frozem"))
    finished = run("verify", root, "--step", 7)
    assert finished.returncode == 1
    assert "checksum" in finished.stdout
    assert run("ls", root).returncode == 1


@pytest.mark.parametrize(
    "arguments", [("ls",), ("show",), ("verify",), ("show", "--step", 5), ("show", "--names", "q")]
)
def test_what_cannot_be_done_is_one_line_on_stderr_and_exit_code_2(root, arguments):
    verb, *options = arguments
    where = root if options else root / "nothing-here"

    finished = run_alone(verb, where, *options)

    assert finished.returncode == 2
    assert finished.stderr.startswith("gpuckpt: ")
    assert len(finished.stderr.strip().splitlines()) == 1
    assert "Traceback" not in finished.stderr


def test_ls_and_show_say_what_is_derived_from_other_tensors(tmp_path):
    master = np.random.default_rng(0).standard_normal((200, 100)).astype(np.float32)
    gpuckpt.save(tmp_path, {"master": master, "copy": master.astype(np.float16)}, 1)

    (step,) = json.loads(run_alone("ls", tmp_path, "--json").stdout)["checkpoints"]
    assert step["derived_nbytes"] == 40_000
    assert "33 %" in run("ls", tmp_path).stdout
    facts = json.loads(run("show", tmp_path, "--json").stdout)
    leaves = {leaf["name"]: leaf for leaf in facts["leaves"]}
    assert {name: leaf["derived_nbytes"] for name, leaf in leaves.items()} == {
        "master": 0,
        "copy": 40_000,
    }
    shown = run("show", tmp_path).stdout
    assert "33 % derived from other tensors" in shown
    assert shown.count("derived") == 2
