"""`.npz`: archives that numpy reads, and archives of strangers."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import gpuckpt
from gpuckpt.conversion.npz import NPZ
from gpuckpt.errors import CorruptError, UnsupportedError
from tests.convert.states import read, training_state, written
from tests.strategies import same, states


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(states())
def test_any_state_goes_there_and_back(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("any") / "x.npz"
    try:
        written(state, NPZ, path)
    except UnsupportedError as error:
        assert "name" in str(error)  # noqa: PT017 - a surrogate or a zero in one
        return
    assert same(read(path, NPZ), state)


def test_numpy_reads_what_is_written_and_other_types_by_a_view(tmp_path):
    state = training_state()
    path = written(state, NPZ, tmp_path / "x.npz")

    with np.load(path) as found:
        assert same(found["model.w"], state["model"]["w"])
        assert same(found["model.none"], state["model"]["none"])
        assert same(found["optimizer.step"], np.array(12))
        half, small = found["model.half"], found["model.small"]
        kept = json.loads(found["gpuckpt.json"])
    assert same(half.view(ml_dtypes.bfloat16), state["model"]["half"])
    assert same(small.view(ml_dtypes.float8_e4m3fn), state["model"]["small"])
    assert kept["dtypes"] == {"model.half": "bfloat16", "model.small": "float8_e4m3fn"}


def test_a_flat_state_of_numpys_types_is_as_numpy_writes_it(tmp_path):
    state = {"b": np.arange(3.0), "a/c": np.array(True), "z": np.zeros((2, 0), ">i2")}
    path = written(state, NPZ, tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", **state)  # type: ignore[arg-type]

    ours, theirs = zipfile.ZipFile(path), zipfile.ZipFile(tmp_path / "y.npz")
    with ours, theirs:
        assert ours.namelist() == theirs.namelist()
        for name in theirs.namelist():
            assert ours.read(name) == theirs.read(name)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_numpys_archives_are_read_packed_or_not_in_any_order(save, tmp_path):
    arrays = {
        "c": np.arange(24.0).reshape(2, 3, 4),
        "f": np.asfortranarray(np.arange(24, dtype=np.int16).reshape(2, 3, 4)),
        "t": np.array(["2020-01-01", "NaT"], "M8[D]"),
        "u": np.array(["é", "ab"]),
        "o": np.array(7, ">u8"),
    }
    save(tmp_path / "x.npz", **arrays)

    gpuckpt.convert(tmp_path / "x.npz", tmp_path / "run", verify=True)

    found = gpuckpt.load(tmp_path / "run")
    assert same(found, arrays)
    assert found["f"].flags.f_contiguous


def test_an_array_longer_than_any_part_goes_through(tmp_path):
    large = {"w": np.random.default_rng(0).integers(0, 9, (3, 1_000_001), np.int64)}
    assert same(read(written(large, NPZ, tmp_path / "x.npz"), NPZ), large)


def member(array: np.ndarray, name: str = "w.npy") -> tuple[str, bytes]:
    file = io.BytesIO()
    np.save(file, array)
    return name, file.getvalue()


def archive(path: Path, *members: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members:
            file.writestr(name, data)
    return path


def test_objects_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "x.npz", fine=np.zeros(2), bad=np.array([print, {}], object))
    with pytest.raises(UnsupportedError, match=r"bad: .*objects"):
        read(tmp_path / "x.npz", NPZ)


def test_records_are_refused_by_name(tmp_path):
    np.savez(tmp_path / "x.npz", rows=np.zeros(2, [("a", "f4"), ("b", "i4")]))
    with pytest.raises(UnsupportedError, match=r"rows: .*records"):
        read(tmp_path / "x.npz", NPZ)


def test_members_that_arent_arrays_are_left_out_and_told(tmp_path):
    path = archive(tmp_path / "x.npz", member(np.zeros(2)), ("readme.txt", b"hello"))
    done = gpuckpt.convert(path, tmp_path / "run")
    assert done.lost == ("the member readme.txt, which isn't an array",)


def test_damaged_archives_are_refused(tmp_path):
    name, data = member(np.arange(1000))
    good = archive(tmp_path / "good.npz", (name, data)).read_bytes()
    at = good.index(np.arange(1000).tobytes()[:64])
    flipped = bytearray(good)
    flipped[at + 100] ^= 1
    small, large = b"False, 'shape': (1000,), }      ", b"True, 'shape': (9999999, 99999)}"
    huge = data.replace(small, large)
    assert len(huge) == len(data)
    assert huge != data
    cases: dict[str, bytes | Path] = {
        "empty": b"",
        "no archive": b"nothing of the kind",
        "cut off": good[: len(good) // 2],
        "flipped": bytes(flipped),
        "a short array": archive(tmp_path / "a.npz", (name, data[:-8])).read_bytes(),
        "a long array": archive(tmp_path / "b.npz", (name, data + b"more")).read_bytes(),
        "no array": archive(tmp_path / "c.npz", ("w.npy", b"\x93NUMPY\x01\x00\x04\x00{}  ")),
        "code for a header": archive(
            tmp_path / "d.npz",
            ("w.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", 20) + b"__import__('os')    "),
        ),
        "a version to come": archive(tmp_path / "e.npz", ("w.npy", b"\x93NUMPY\x09\x00" + data)),
        "a huge array in Fortran order": archive(
            tmp_path / "h.npz",
            ("w.npy", huge),
        ),
        "no structure": archive(tmp_path / "f.npz", (name, data), ("gpuckpt.json", b"{")),
        "another type": archive(
            *(tmp_path / "g.npz", (name, data)),
            ("gpuckpt.json", b'{"dtypes": {"w": "bfloat16"}, "state": {}}'),
        ),
    }
    for what, content in cases.items():
        path = tmp_path / "x.npz"
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        assert is_refused(path), what


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_bytes_that_dont_fit_the_archives_check_value_are_refused(packing, tmp_path):
    name, data = member(np.arange(1000))
    with zipfile.ZipFile(tmp_path / "x.npz", "w", packing) as file:
        file.writestr(name, data)
        crc = file.getinfo(name).CRC
    content = (tmp_path / "x.npz").read_bytes()
    assert content.count(struct.pack("<L", crc)) == 2
    (tmp_path / "x.npz").write_bytes(content.replace(struct.pack("<L", crc), b"wxyz"))
    assert is_refused(tmp_path / "x.npz")


def is_refused(path: Path) -> bool:
    try:
        read(path, NPZ)
    except CorruptError as error:
        return path.name in str(error)
    return False


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_arrays_of_one_name_are_refused(tmp_path):
    path = archive(tmp_path / "x.npz", member(np.zeros(1)), member(np.ones(1)))
    with pytest.raises(CorruptError, match="one name"):
        read(path, NPZ)


def test_names_that_an_archive_cant_have_are_refused(tmp_path):
    for name in ("a\0b", "x" * 70_000, "\ud800"):
        with pytest.raises(UnsupportedError, match="name"):
            written({name: np.zeros(1)}, NPZ, tmp_path / "x.npz")
    assert not list(tmp_path.iterdir())
