"""Checksums go along with what is converted, and are compared when it is converted again."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.conversion.checksums import (
    Checksum,
    Noted,
    blank,
    pack_checksums,
    unpack_checksums,
)
from gpuckpt.errors import CorruptError, InvalidError
from gpuckpt.fingerprint import fingerprint
from gpuckpt.spec import Spec
from tests.strategies import same

pytestmark = pytest.mark.filterwarnings("ignore")

# Each with the format that has to be named.
TARGETS = {
    "x.safetensors": None,
    "shards": "safetensors",
    "x.npz": None,
    "x.pt": None,
    "dcp": "dcp",
    "orbax": "orbax",
    "singa": "singa",
    "step7-worker0.bin": None,
    "fluid": "fluid",
    "checkpoint_7": None,
}
NEEDED = {"x.pt": "torch", "dcp": "torch", "orbax": "orbax"}
# These have check values of their own, which find the same.
OWN = ("x.npz", "dcp")


def a_state() -> dict[str, Any]:
    random = np.random.default_rng(5)
    return {name: random.random((40, 30), np.float32) for name in ("ip1_weight", "ip2_weight")}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("root") / "run"
    gpuckpt.save(folder, a_state(), 7)
    return Path(folder)


def exported(root: Path, folder: Path, name: str) -> Path:
    if name in NEEDED and importlib.util.find_spec(NEEDED[name]) is None:
        pytest.skip(f"needs {NEEDED[name]}")
    shard = 5_000 if name == "shards" else None
    gpuckpt.convert(root, folder / name, to=TARGETS[name], shard_size=shard, verify=True)
    return folder / name


def files(path: Path) -> Iterator[Path]:
    every = sorted(path.rglob("*")) if path.is_dir() else [path]
    yield from (one for one in every if one.is_file())


def flip_a_bit(path: Path, array: np.ndarray) -> None:
    """In the middle of an array, wherever it is in the files."""
    wanted = array.tobytes()[len(array.tobytes()) // 2 :][:64]
    for file in files(path):
        data = bytearray(file.read_bytes())
        if (at := data.find(wanted)) >= 0:
            data[at + 30] ^= 4
            file.write_bytes(data)
            return
    raise AssertionError("it isn't there")


@pytest.mark.parametrize("name", TARGETS)
def test_a_flipped_bit_in_a_target_is_found_when_it_is_converted_back(name, root, tmp_path):
    target = exported(root, tmp_path, name)
    done = gpuckpt.convert(target, tmp_path / "back", to="gpuckpt")
    assert {one.checked for one in done.tensors} == {"checksum"}
    assert done.checked == 2
    found = gpuckpt.load(tmp_path / "back", like="numpy")
    assert all(same(found[key], array) for key, array in a_state().items())

    if name == "orbax":
        change_a_value(target)
    else:
        flip_a_bit(target, a_state()["ip2_weight"])

    with pytest.raises(CorruptError, match=r"ip2_weight|bytes of the tensor"):
        gpuckpt.convert(target, tmp_path / "again", to="gpuckpt")
    assert not (tmp_path / "again").exists()
    if name in OWN:
        return
    done = gpuckpt.convert(target, tmp_path / "again", to="gpuckpt", ignore_checksums=True)
    assert done.checked == 0
    other = gpuckpt.load(tmp_path / "again", like="numpy")
    assert same(other["ip1_weight"], a_state()["ip1_weight"])
    assert not same(other["ip2_weight"], a_state()["ip2_weight"])


def change_a_value(folder: Path) -> None:
    """Of an array of Orbax's, by TensorStore."""
    import tensorstore

    store = {"driver": "ocdbt", "base": f"file://{folder}/", "path": "ip2_weight/"}
    array = tensorstore.open({"driver": "zarr", "kvstore": store}, open=True).result()
    array[3, 4].write(np.float32(17)).result()


def test_checksums_are_as_the_guide_says(root, tmp_path):
    state = a_state()
    wanted = {
        name: {
            "dtype": "float32",
            "shape": [40, 30],
            "fingerprint": fingerprint(array.reshape(-1).view(np.uint8).data),
        }
        for name, array in state.items()
    }
    body = {"gpuckpt": "checksums", "version": 1, "fingerprint": "xxh3-128-tree"}
    for name, beside in (
        ("singa", "step7.checksums.json"),
        ("fluid", "checkpoint_7/gpuckpt.checksums.json"),
    ):
        text = (exported(root, tmp_path, name) / beside).read_text()
        assert json.loads(text) == {**body, "tensors": wanted}
    target = exported(root, tmp_path, "step7-worker0.bin")
    assert target.with_name("step7.checksums.json").read_text() == text


def test_other_readers_of_single_files_do_not_mind(root, tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason="safetensors isn't installed")
    found = library.load_file(exported(root, tmp_path, "x.safetensors"))
    assert same(dict(sorted(found.items())), a_state())
    with np.load(exported(root, tmp_path, "x.npz")) as archive:
        assert archive.files == ["ip1_weight", "ip2_weight", "gpuckpt.json"]
        assert same(archive["ip1_weight"], a_state()["ip1_weight"])


def test_orbaxs_readers_do_not_mind(root, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint", reason="needs orbax-checkpoint")
    target = exported(root, tmp_path, "orbax")
    for one in (ocp.PyTreeCheckpointer(), ocp.StandardCheckpointer()):
        found = {key: np.asarray(array) for key, array in one.restore(target).items()}
        assert same(found, a_state())
    (tmp_path / "managed" / "7").mkdir(parents=True)
    target.rename(tmp_path / "managed" / "7" / "default")
    with ocp.CheckpointManager(tmp_path / "managed") as manager:
        found = manager.restore(7, args=ocp.args.StandardRestore())
        assert {key: np.asarray(array).tobytes() for key, array in found.items()} == {
            key: array.tobytes() for key, array in a_state().items()
        }
    assert gpuckpt.convert(tmp_path / "managed", tmp_path / "back", to="gpuckpt").checked == 2


def test_what_was_changed_in_whole_is_told_from_what_stands_with_it(root, tmp_path):
    target = exported(root, tmp_path, "fluid")
    (target / "checkpoint_7/__model__/ip1_weight").unlink()
    with pytest.raises(
        CorruptError, match=r"ip1_weight: there is no such tensor, and .*\.json has"
    ):
        gpuckpt.convert(target, tmp_path / "back", to="gpuckpt")
    gpuckpt.convert(target, tmp_path / "some", to="gpuckpt", names="ip2*")
    gpuckpt.convert(target, tmp_path / "back", to="gpuckpt", ignore_checksums=True)

    gpuckpt.save(tmp_path / "other", {"ip1_weight": np.zeros(2, "f4"), "ip2_weight": np.ones(1)})
    gpuckpt.convert(tmp_path / "other", tmp_path / "y.npz")
    beside = tmp_path / "fluid/checkpoint_7/gpuckpt.checksums.json"
    beside.write_bytes(b'{"gpuckpt": "checksums", "version": 2}')
    with pytest.raises(CorruptError, match="no checksums that can be read"):
        gpuckpt.convert(target, tmp_path / "again", to="gpuckpt")


def test_a_source_without_any_is_converted_and_that_is_told(tmp_path):
    from gpuckpt.conversion.safetensors import SAFETENSORS
    from tests.convert.states import written

    path = written({"w": np.zeros(3)}, SAFETENSORS, tmp_path / "x.safetensors")
    done = gpuckpt.convert(path, tmp_path / "x.npz")
    assert [one.checked for one in done.tensors] == [None]
    assert "none compared with a checksum: the source has none" in str(done)
    np.savez(tmp_path / "y.npz", w=np.zeros(3))
    done = gpuckpt.convert(tmp_path / "y.npz", tmp_path / "root")
    assert [one.checked for one in done.tensors] == ["format"]
    assert "all compared with their checksums" in str(done)


def test_a_file_that_is_not_checksums_is_not_replaced_by_them(root, tmp_path):
    pytest.importorskip("torch", reason="needs torch")
    for name in ("x.pt", "step7-worker0.bin"):
        beside = tmp_path / ("x.pt.checksums.json" if name == "x.pt" else "step7.checksums.json")
        beside.write_text("{}")
        for force in (False, True):
            with pytest.raises(InvalidError, match=f"{beside.name}: the checksums of what"):
                gpuckpt.convert(root, tmp_path / name, force=force)
        assert beside.read_text() == "{}"
        assert not (tmp_path / name).exists()
        beside.unlink()
        for force in (False, True):
            gpuckpt.convert(root, tmp_path / name, force=force, verify=True)
        assert unpack_checksums(Noted(beside.read_text(), "x"))


checksums = st.builds(
    Checksum,
    st.text(st.characters(codec="ascii"), max_size=8),
    st.lists(st.integers(0, 1 << 40), max_size=4).map(tuple),
    st.text("0123456789abcdef", min_size=32, max_size=32),
)


@settings(deadline=None)
@given(st.dictionaries(st.text(st.characters()), checksums, max_size=4))
def test_checksums_come_back_and_their_text_has_one_length(found):
    text = pack_checksums(found)
    assert unpack_checksums(Noted(text, "x")) == found
    assert unpack_checksums(Noted(text, "x", "a.")) == {
        f"a.{key}": one for key, one in found.items()
    }
    specs = [Spec(name, "float32", (3,)) for name in found]
    same_kind = {name: Checksum("float32", (3,), one.fingerprint) for name, one in found.items()}
    assert len(pack_checksums(blank(specs))) == len(pack_checksums(same_kind))


@settings(deadline=None, max_examples=40)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(),
        lambda one: (
            st.dictionaries(
                st.sampled_from(
                    ["gpuckpt", "version", "fingerprint", "tensors", "w", "dtype", "shape"]
                ),
                one,
            )
            | st.lists(one)
        ),
    )
)
def test_no_text_makes_the_reader_raise_anything_but_its_own_error(body):
    whole = {"gpuckpt": "checksums", "version": 1, "fingerprint": "xxh3-128-tree", "tensors": body}
    for text in (json.dumps(body), json.dumps(whole), str(body)):
        try:
            unpack_checksums(Noted(text, "x"))
        except CorruptError as error:
            assert "--ignore-checksums" in str(error)  # noqa: PT017
