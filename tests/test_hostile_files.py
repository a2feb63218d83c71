"""Files of a stranger whose checksums fit: read or refused by name, within bounds."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

import gpuckpt
from gpuckpt import hostmemory, layout, loading
from gpuckpt.cli import main
from gpuckpt.cli.showing import show_step
from gpuckpt.commit import open_step
from gpuckpt.errors import CheckpointError, CorruptError, DeviceMemoryError, UnsupportedError
from gpuckpt.fingerprint import checksum, checksum128
from gpuckpt.manifest import Manifest, pack_manifest
from gpuckpt.segments import read_index
from gpuckpt.stores.local import LocalStore
from gpuckpt.values import parse_json
from tests import hostile, hostile_rows

ROOTS = hostile.golden_roots()
ROWS, INDEX_ROWS = hostile_rows.rows(), hostile_rows.index_rows()
PEAK_NBYTES = 200 << 20


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(root=st.sampled_from(ROOTS), data=st.data())
def test_a_stranger_s_changes_are_read_or_refused(root, data, tmp_path_factory):
    directory = tmp_path_factory.getbasetemp() / "hostile"
    files = hostile.changed(root.files, lambda n: data.draw(st.integers(0, n - 1)))
    hostile.write(directory, files)
    hostile.use(directory)


@pytest.mark.parametrize("what", ROWS)
def test_a_stranger_s_checkpoint_is_refused(what, tmp_path):
    hostile.write(tmp_path / "root", ROWS[what])
    with pytest.raises(CheckpointError):
        gpuckpt.load(tmp_path / "root", device="cpu", like="numpy")
    hostile.use(tmp_path / "root")


@pytest.mark.parametrize("what", INDEX_ROWS)
def test_a_stranger_s_segment_is_refused(what, tmp_path):
    hostile.write(tmp_path / "root", INDEX_ROWS[what])
    (segment,) = (tmp_path / "root").glob("*.segment")
    with pytest.raises(CheckpointError):
        gpuckpt.load(segment, device="cpu", like="numpy")
    hostile.use(tmp_path / "root")


def test_what_the_rows_are_made_of_is_read(tmp_path):
    hostile.write(tmp_path / "root", hostile_rows.base())
    assert gpuckpt.load(tmp_path / "root")["w"].nbytes == hostile_rows.NBYTES
    (segment,) = (tmp_path / "root").glob("*.segment")
    assert not gpuckpt.load(segment)["w"].any()
    whole = hostile.frame(hostile_rows.NBYTES, hostile_rows.NBYTES)
    hostile.write(tmp_path / "root", hostile_rows.framed(hostile_rows.base(), whole))
    assert not gpuckpt.load(tmp_path / "root")["w"].any()


def test_every_row_together_takes_little_memory():
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile_rows"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < PEAK_NBYTES


@pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.name)
def test_golden_files_as_they_are_are_refused_nowhere_on_a_host(root, tmp_path):
    hostile.write(tmp_path / "root", root.files)
    refused = hostile.use(tmp_path / "root")
    segments = sum(name.endswith(".segment") for name in root.files)
    # A segment alone may hold a part of a tensor, and "*" fits nothing in a state that is empty.
    assert refused <= segments + (root.name == "nothing.auto")


def test_a_damaged_checkpoint_with_a_nan_among_its_values_is_refused_once(tmp_path):
    state = {"w": np.arange(1000.0), "best": float("nan")}
    gpuckpt.save(tmp_path, state, metrics={"loss": float("nan")})
    (segment,) = tmp_path.glob("*.segment")
    data = bytearray(segment.read_bytes())
    data[layout.HEADER.size + 8] ^= 1
    segment.write_bytes(data)
    with pytest.raises(CorruptError, match="w in"):
        gpuckpt.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *(b'{"a":1,"a":2}', b'[{"b":{"a":1,"a":1}}]', b"NaN", b"[Infinity]", b"-Infinity"),
        *(b"9" * 5000, b"", b"{", b"[" * 100_000, b"\xff"),
    ],
)
def test_json_that_could_be_read_in_two_ways_is_refused(text):
    with pytest.raises((ValueError, RecursionError)):
        parse_json(text)


@pytest.mark.parametrize("as_json", [False, True])
def test_integers_of_more_digits_than_python_writes_are_shown(as_json, tmp_path):
    """Found by the fuzzer."""
    gpuckpt.save(tmp_path, {"n": 2**20_000 - 1, (2**20_000, "key"): -(2**20_000)})
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert show_step(tmp_path, None, None, Console(file=out, width=200), as_json=as_json) == 0
    assert "0xffffffff" in out.getvalue()


def test_what_a_terminal_would_obey_is_not_printed(tmp_path, capsys, monkeypatch):
    evil = "\x1b[2J\x1b]0;owned\x07\x9b31m"
    gpuckpt.save(tmp_path, {evil: np.arange(3), "b": evil}, 1, metrics={evil: 1.0})
    (path,) = tmp_path.glob("*.manifest.json")
    body = hostile.body_of(path.read_bytes()) | {"writer": evil}
    path.write_bytes(hostile.sealed_manifest(json.dumps(body).encode()))
    commands = [["ls"], ["show"], ["verify"]]
    (segment,) = tmp_path.glob("*.segment")
    data = segment.read_bytes()
    for damaged in (False, True):
        segment.write_bytes(data[:70] + bytes([data[70] ^ damaged]) + data[71:])
        for command in commands:
            monkeypatch.setattr(sys, "argv", ["gpuckpt", *command, str(tmp_path)])
            with pytest.raises(SystemExit):
                main()
    body["tensors"][0]["dtype"] = evil
    path.write_bytes(hostile.sealed_manifest(json.dumps(body).encode()))
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["gpuckpt", *command, str(tmp_path)])
        with pytest.raises(SystemExit):
            main()
    shown = "".join(capsys.readouterr())
    assert "owned" in shown
    assert "DAMAGED" in shown
    assert not {one for one in shown if not one.isprintable()} - {"\n"}


def test_json_of_our_own_is_read():
    assert parse_json(b'{"a":[1,2.5,null,{"a":"x"}]}') == {"a": [1, 2.5, None, {"a": "x"}]}


def test_two_tensors_of_one_name_are_refused(tmp_path):
    gpuckpt.save(tmp_path, {"a": np.arange(3), "b": np.arange(3)})
    (path,) = tmp_path.glob("*.manifest.json")
    body = hostile.body_of(path.read_bytes())
    body["tensors"][1]["name"] = body["tensors"][0]["name"]
    path.write_bytes(hostile.sealed_manifest(json.dumps(body).encode()))
    with pytest.raises(CorruptError, match="one name"):
        gpuckpt.load(tmp_path)


def test_a_manifest_as_long_as_no_one_s_is_not_read(tmp_path):
    gpuckpt.save(tmp_path, {"a": np.arange(3)})
    (path,) = tmp_path.glob("*.manifest.json")
    os.truncate(path, 1 << 40)  # takes no space
    with pytest.raises(CorruptError, match="no manifest's"):
        gpuckpt.load(tmp_path)


def test_a_manifest_that_no_reader_would_take_is_not_written(monkeypatch):
    monkeypatch.setattr(layout, "MANIFEST_NBYTES_MAX", 100)
    with pytest.raises(UnsupportedError, match="put small tensors together"):
        pack_manifest(Manifest(1, {"dict": []}, ()))


def test_an_index_as_long_as_no_one_s_is_not_read(tmp_path):
    gpuckpt.save(tmp_path, {"a": np.arange(3)})
    (path,) = tmp_path.glob("*.segment")
    zeros = zstandard.compress(bytes(layout.INDEX_NBYTES_MAX + 1))
    bomb = hostile.sealed_segment(layout.pack_header(), b"0")[: layout.HEADER.size] + zeros
    digest = bytes.fromhex(checksum128(zeros))
    lengths = (layout.HEADER.size, len(zeros), layout.INDEX_NBYTES_MAX + 1)
    path.write_bytes(bomb + layout.pack_trailer(layout.SegmentTrailer(*lengths, digest)))
    with pytest.raises(CorruptError, match="trailer"):
        read_index(LocalStore(tmp_path), path.name)


def bomb(root: Path, chunks: int, nbytes: int) -> None:
    """A checkpoint of a tensor of zeros whose file is a thousandth of it."""
    gpuckpt.save(root, {"w": np.zeros(nbytes, np.uint8)}, codec="zstd")
    (path,) = root.glob("*.manifest.json")
    body = hostile.body_of(path.read_bytes())
    (tensor,) = body["tensors"]
    (row,) = tensor["chunks"]
    tensor["shape"] = [chunks * nbytes]
    tensor["chunks"] = [[at * nbytes, *row[1:]] for at in range(chunks)]
    path.write_bytes(hostile.sealed_manifest(json.dumps(body).encode()))


def test_a_checkpoint_larger_than_the_host_is_refused_before_anything_is_allocated(tmp_path):
    bomb(tmp_path, 20_000, 1 << 20 << 2)  # 80 GiB
    assert open_step(LocalStore(tmp_path)).raw_nbytes == 20_000 << 22
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hostmemory, "_of_system", lambda: 16 << 30)
        with pytest.raises(DeviceMemoryError, match="names="):
            gpuckpt.load(tmp_path)


def test_where_the_host_does_not_say_what_it_has_loading_goes_on(tmp_path, monkeypatch):
    gpuckpt.save(tmp_path, {"a": np.arange(3)})
    monkeypatch.setattr(loading, "available_nbytes", lambda: None)
    assert gpuckpt.load(tmp_path)["a"].tolist() == [0, 1, 2]


def test_the_host_s_memory_is_the_least_of_system_and_group(tmp_path, monkeypatch):
    for name in ("MEMINFO", "LIMIT"):
        monkeypatch.setattr(hostmemory, name, tmp_path / name)
    assert hostmemory.available_nbytes() is None
    text = "MemTotal: 9 kB\nMemAvailable:    4 kB\nSwapFree: 2 kB\n"
    (tmp_path / "MEMINFO").write_text(text)
    assert hostmemory.available_nbytes() == 6 << 10
    (tmp_path / "LIMIT").write_text("max\n")
    assert hostmemory.available_nbytes() == 6 << 10
    (tmp_path / "LIMIT").write_text("5000\n")
    assert hostmemory.available_nbytes() == 5000
    (tmp_path / "MEMINFO").write_text("nonsense")
    assert hostmemory.available_nbytes() == 5000


PROBE = """
import resource, sys
from pathlib import Path
from tests import hostile
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
hostile.use(Path(sys.argv[1]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


@pytest.mark.parametrize("kind", ["deep", "wide", "long frame", "many chunks"])
def test_memory_and_time_stay_bounded(tmp_path, kind):
    root = tmp_path / "root"
    bomb(root, 2000 if kind == "many chunks" else 1, 4 << 20)
    (path,) = root.glob("*.manifest.json")
    (segment,) = root.glob("*.segment")
    body = hostile.body_of(path.read_bytes())
    if kind == "deep":
        path.write_bytes(hostile.sealed_manifest(b"[" * 10_000_000))
    elif kind == "wide":
        body["structure"] = {"list": [{"tensor": 0}] * 10_000}
        path.write_bytes(hostile.sealed_manifest(json.dumps(body).encode()))
    elif kind == "long frame":
        frame = zstandard.compress(bytes(512 << 20))
        row = body["tensors"][0]["chunks"][0]
        row[3], row[4], row[7] = layout.HEADER.size, len(frame), [["zstd", len(frame)]]
        row[6] = checksum([frame])
        path.write_bytes(hostile.sealed_manifest(json.dumps(body).encode()))
        segment.write_bytes(hostile.sealed_segment(layout.pack_header() + frame, b"{}"))
    begun = time.monotonic()
    limited = "import resource; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
    done = subprocess.run(
        [sys.executable, "-c", limited + PROBE, str(root)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < PEAK_NBYTES
    assert time.monotonic() - begun < 60  # a bound on what an attack costs, not a speed


def test_every_refusal_of_a_bomb_is_a_checkpoint_error(tmp_path):
    bomb(tmp_path, 3, 1 << 20)
    loaded = gpuckpt.load(tmp_path)
    assert loaded["w"].nbytes == 3 << 20
    assert issubclass(DeviceMemoryError, CheckpointError)
