"""SINGA's checkpoints are read as its own protobuf messages say, and written so."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import gpuckpt
from gpuckpt.conversion import convert
from gpuckpt.conversion.port import Options, Outline, flat_structure, read_whole
from gpuckpt.conversion.singa import FILE_NBYTES_MAX, open_singa, write_singa
from gpuckpt.errors import (
    CorruptError,
    InvalidError,
    MismatchError,
    NotFoundError,
    UnsupportedError,
)
from gpuckpt.spec import Spec
from tests.convert.hostile_bytes import damaged, read_all, read_or_refuse

# What SINGA 0.2 writes of a parameter `b` of two floats, at version 400, byte by byte.
BY_HAND = bytes.fromhex(
    "18 9003"  # version (3, a varint): 400
    "22 01 62"  # name (4, bytes): "b"
    "2a 0c"  # blob (5, bytes): 12 bytes
    "08 02"  # shape (1, a varint): 2
    "12 08 0000803f 000020c0"  # data (2, packed floats): 1.0, -2.5
)


def arrays(**more) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {
        "ip1_weight": rng.standard_normal((8, 6)).astype("f4"),
        "ip1_bias": rng.standard_normal(8).astype("f4"),
        "odd": rng.standard_normal((7, 3)).astype("f4"),
        **more,
    }


def by_protobuf(
    params: dict[str, np.ndarray], version: int = 400, *, kind: str = "BlobProtos"
) -> bytes:
    """A file as Google's protobuf writes it of SINGA's own message."""
    protos = pytest.importorskip("tests.convert.old_protos", reason="needs protobuf")
    message = getattr(protos, kind)()
    for name, array in params.items():
        message.name.append(name)
        message.version.append(version)
        blob = message.blob.add()
        blob.shape.extend(array.shape)
        blob.data.extend(array.ravel().tolist())
    data: bytes = message.SerializeToString()
    return data


def as_root(tmp_path: Path, state: dict, step: int = 400) -> Path:
    gpuckpt.save(tmp_path / "root", state, step=step)
    return tmp_path / "root"


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def test_a_file_written_by_hand_from_the_specification_is_read(tmp_path):
    (tmp_path / "step400-worker0.bin").write_bytes(BY_HAND)
    assert_same(read_all(tmp_path), {"b": np.array([1.0, -2.5], "f4")})


def test_the_same_parameter_is_written_as_these_bytes(tmp_path):
    root = as_root(tmp_path, {"b": np.array([1.0, -2.5], "f4")})
    convert(root, tmp_path / "singa", to="singa")
    assert (tmp_path / "singa" / "step400-worker0.bin").read_bytes() == BY_HAND


def test_files_are_byte_for_byte_those_of_protobuf(tmp_path):
    state = arrays(empty=np.zeros((0, 3), "f4"))
    convert(as_root(tmp_path, state), tmp_path / "singa", to="singa", verify=True)
    found = (tmp_path / "singa" / "step400-worker0.bin").read_bytes()
    assert found == by_protobuf(state)


@pytest.mark.parametrize("name", ["step700-worker0.bin", "step700-worker0", "job-step700-worker0"])
def test_a_file_of_any_of_the_old_spellings_is_read_with_its_step(tmp_path, name):
    (tmp_path / name).write_bytes(by_protobuf(arrays()))
    done = convert(tmp_path, tmp_path / "root", to="gpuckpt", verify=True)
    assert (done.step, done.source_format) == (700, "singa")
    assert_same(gpuckpt.load(tmp_path / "root", 700), arrays())


def test_floats_and_shapes_that_come_packed_or_one_by_one_are_the_same(tmp_path):
    (tmp_path / "step1-worker0.bin").write_bytes(by_protobuf(arrays(), kind="UnpackedBlobProtos"))
    assert_same(read_all(tmp_path), arrays())


def test_many_floats_that_come_one_by_one_are_read_as_one_run(tmp_path):
    state = {"w": np.arange(5000, dtype="f4"), "b": np.ones(2, "f4")}
    (tmp_path / "step1-worker0.bin").write_bytes(by_protobuf(state, kind="UnpackedBlobProtos"))
    assert_same(read_all(tmp_path), state)


def test_slices_of_several_workers_are_joined_and_what_one_has_stays_whole(tmp_path):
    state = arrays()
    for worker in range(4):
        part = {name: np.split(state[name], 4)[worker] for name in ("ip1_weight", "ip1_bias")}
        own = part | ({"odd": state["odd"]} if worker == 0 else {})
        (tmp_path / f"step400-worker{worker}.bin").write_bytes(by_protobuf(own))
    assert_same(read_all(tmp_path), state)
    assert_same(read_all(tmp_path / "step400-worker2.bin"), state)


def test_slices_along_another_axis_are_joined_if_that_is_named(tmp_path):
    whole = np.arange(24, dtype="f4").reshape(4, 6)
    for worker, part in enumerate(np.split(whole, 3, axis=1)):
        (tmp_path / f"step1-worker{worker}.bin").write_bytes(by_protobuf({"w": part}))
    with open_singa(str(tmp_path), Options(axes={"w": 1})) as source:
        assert_same({"w": read_whole(source, 0)}, {"w": whole})


def test_unnamed_parameters_of_partitioned_layers_are_joined_under_the_layers_name(tmp_path):
    whole = np.arange(8, dtype="f4").reshape(4, 2)
    for worker, part in enumerate(np.split(whole, 2)):
        own = {f"ip@0{worker}$": part} | ({} if worker else {"data@00$$": whole})
        (tmp_path / f"step1-worker{worker}.bin").write_bytes(by_protobuf(own))
    assert_same(read_all(tmp_path), {"ip$": whole, "data@00$$": whole})


def test_the_newest_step_is_read_unless_another_is_named(tmp_path):
    folder = tmp_path / "workspace" / "checkpoint"
    folder.mkdir(parents=True)
    for step in (400, 700, 1000):
        params = {"b": np.full(2, step, "f4")}
        (folder / f"step{step}-worker0.bin").write_bytes(by_protobuf(params, step))
    convert(tmp_path / "workspace", tmp_path / "newest", to="gpuckpt")
    convert(tmp_path / "workspace", tmp_path / "named", to="gpuckpt", step=700)
    assert gpuckpt.load(tmp_path / "newest", 1000)["b"][0] == 1000
    assert gpuckpt.load(tmp_path / "named", 700)["b"][0] == 700
    with pytest.raises(NotFoundError, match="no SINGA checkpoint of step 5; there are"):
        convert(tmp_path / "workspace", tmp_path / "none", to="gpuckpt", step=5)


def test_versions_that_are_not_the_step_are_kept(tmp_path):
    (tmp_path / "step400-worker0.bin").write_bytes(by_protobuf(arrays(), version=399))
    with open_singa(str(tmp_path), Options()) as source:
        assert set(json.loads(source.outline.metadata["singa.versions"]).values()) == {399}
        write_singa(str(tmp_path / "again"), source, Options())
    again = (tmp_path / "again" / "step400-worker0.bin").read_bytes()
    assert again == (tmp_path / "step400-worker0.bin").read_bytes()


def test_a_size_of_files_makes_as_many_workers_as_it_takes(tmp_path):
    state = arrays()
    root = as_root(tmp_path, state)
    done = convert(root, tmp_path / "singa", to="singa", shard_size=150, verify=True)
    names = sorted(path.name for path in (tmp_path / "singa").glob("*.bin"))
    assert names == [f"step400-worker{worker}.bin" for worker in range(4)]
    assert done.lost == ()
    first = by_protobuf({name: state[name][:2] for name in ("ip1_weight", "ip1_bias")})
    assert (tmp_path / "singa" / "step400-worker0.bin").read_bytes() != first
    second = {name: state[name][2:4] for name in ("ip1_weight", "ip1_bias")}
    assert (tmp_path / "singa" / "step400-worker1.bin").read_bytes() == by_protobuf(second)


def test_parameters_are_cut_and_joined_along_the_axes_that_are_named(tmp_path):
    state = arrays()
    root, w = as_root(tmp_path, state), state["ip1_weight"]
    workers, axes = 3, {"ip1_weight": 1}
    assert w.shape[1] % workers == 0
    convert(root, tmp_path / "singa", to="singa", workers=workers, axes=axes, verify=True)
    assert len(list((tmp_path / "singa").glob("*.bin"))) == workers
    with open_singa(str(tmp_path / "singa"), Options(step=400)) as source:
        (joined,) = (one for one in source.outline.specs if one.name == "ip1_weight")
    assert joined.shape == (w.shape[0] * workers, w.shape[1] // workers)  # as it isn't

    with pytest.raises(CorruptError, match=r"ip1_weight: it is float32 .*, and .* has float32"):
        convert(tmp_path / "singa", tmp_path / "wrong", to="gpuckpt")
    convert(tmp_path / "singa", tmp_path / "back", to="gpuckpt", axes=axes)
    for name, array in gpuckpt.load(tmp_path / "back").items():
        assert array.tobytes() == state[name].tobytes(), name


def test_axes_and_workers_that_mean_nothing_are_refused(tmp_path):
    root = as_root(tmp_path, arrays())
    convert(root, tmp_path / "singa", to="singa", workers=2)
    for options, error, words in (
        ({"to": "npz", "workers": 2}, InvalidError, "for targets of singa, not of npz"),
        ({"to": "npz", "axes": {"w": 1}}, InvalidError, "from or to singa"),
        ({"to": "singa", "axes": {"w": 1}}, NotFoundError, "no parameter that is called w"),
        ({"to": "singa", "axes": {"ip1_bias": 1}}, NotFoundError, "no axis 1 of a parameter"),
        ({"to": "singa", "workers": 0}, InvalidError, "from 1 to 1024"),
    ):
        with pytest.raises(error, match=words):
            convert(root, tmp_path / "x", **options)
    with pytest.raises(NotFoundError, match=r"no parameter is called w \(of axes\)"):
        convert(tmp_path / "singa", tmp_path / "x", to="gpuckpt", axes={"w": 1})
    assert not (tmp_path / "x").exists()


def test_a_target_that_is_called_like_a_file_is_that_file(tmp_path):
    convert(as_root(tmp_path, arrays()), tmp_path / "step9-worker0.bin", verify=True)
    assert (tmp_path / "step9-worker0.bin").read_bytes() == by_protobuf(arrays(), 9)
    with pytest.raises(InvalidError, match="give a directory"):
        convert(tmp_path / "root", tmp_path / "step9-worker1.bin")


def test_what_is_not_float32_is_refused_by_name_before_anything_is_written(tmp_path):
    root = as_root(tmp_path, arrays(ids=np.arange(3)))
    with pytest.raises(UnsupportedError, match="ids: SINGA's files hold float32 alone"):
        convert(root, tmp_path / "singa", to="singa")
    assert not (tmp_path / "singa").exists()


def test_values_and_nesting_are_told_as_lost(tmp_path):
    root = as_root(tmp_path, {"model": {"w": np.ones(2, "f4")}, "seed": 5})
    done = convert(root, tmp_path / "singa", to="singa", verify=True)
    assert done.lost == ("seed: a value, not an array",)
    done = convert(root, tmp_path / "one", to="singa", names="model.*")
    assert done.lost == ()


def test_arrays_that_are_one_are_written_under_each_name(tmp_path):
    one = np.arange(6, dtype="f4")
    root = as_root(tmp_path, {"a": one, "b": one})
    done = convert(root, tmp_path / "singa", to="singa", verify=True)
    assert "names are of one array" in done.lost[0]
    assert_same(read_all(tmp_path / "singa"), {"a": one, "b": one})


class Huge:
    """A source of one long tensor, which nobody may read."""

    outline = Outline(flat_structure(["w"]), (Spec("w", "float32", (FILE_NBYTES_MAX // 4 + 1,)),))

    def read(self, position: int):
        raise AssertionError


def test_a_file_that_singa_could_not_read_is_not_written(tmp_path):
    with pytest.raises(UnsupportedError, match=r"SINGA reads 512\.0 MiB at most"):
        write_singa(str(tmp_path / "singa"), Huge(), Options(workers=2))
    assert list(tmp_path.iterdir()) == []


def test_a_workers_file_that_is_missing_is_named(tmp_path):
    for worker in (0, 2):
        (tmp_path / f"step1-worker{worker}.bin").write_bytes(BY_HAND)
    with pytest.raises(NotFoundError, match="the file of worker 1 isn't there"):
        read_all(tmp_path)


def test_a_slice_that_is_missing_is_named(tmp_path):
    for worker in range(3):
        own = {} if worker == 1 else {"b": np.ones(2, "f4")}
        (tmp_path / f"step1-worker{worker}.bin").write_bytes(by_protobuf(own))
    with pytest.raises(CorruptError, match=r"workers 0, 2 of 3 have a slice of it"):
        read_all(tmp_path)


def test_slices_that_do_not_fit_are_told_with_their_shapes(tmp_path):
    for worker in range(2):
        own = {"w": np.ones((2, 3 + worker), "f4")}
        (tmp_path / f"step1-worker{worker}.bin").write_bytes(by_protobuf(own))
    with pytest.raises(MismatchError, match=r"worker 1: \(2, 4\)"):
        read_all(tmp_path)


def test_two_files_of_one_worker_are_not_guessed_between(tmp_path):
    for name in ("step1-worker0", "step1-worker0.bin"):
        (tmp_path / name).write_bytes(BY_HAND)
    with pytest.raises(CorruptError, match="are both of step 1 and worker 0"):
        read_all(tmp_path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x22\xff\xff\xff\xff\x7f" + b"b" * 40, "ends at"),
        (b"\x22\x01b", "1 names, 0 versions and 0 blobs"),
        (b"\x22\x01\xff\x2a\x00", "isn't UTF-8"),
        (b"\x22\x01b\x2a\x02\x08\x05", "0 floats, and its shape is"),
        (b"\x22\x01b\x2a\x0b\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "has the shape"),
        (b"\x22\x01b\x2a\x05\x12\x03abc", "are 3 bytes"),
        (b"\x07", "begins no field"),
        (b"\x0b", "wire type 3"),
        (b"\xff" * 11, "begins no number"),
        (b"\x22\x81\x40" + b"n" * 8193, "8193 bytes long"),
    ],
)
def test_a_file_that_is_no_message_is_refused_with_its_place(tmp_path, data, reason):
    (tmp_path / "step1-worker0.bin").write_bytes(data)
    with pytest.raises(CorruptError, match=reason) as caught:
        read_all(tmp_path)
    assert "step1-worker0.bin" in str(caught.value)


def test_a_shape_that_no_array_can_have_is_refused_even_without_floats(tmp_path):
    extents = b"\x08\xff\xff\xff\xff\x07" * 3 + b"\x08\x00"
    (tmp_path / "step1-worker0.bin").write_bytes(b"\x22\x01b\x2a" + bytes([len(extents)]) + extents)
    with pytest.raises(CorruptError, match="has the shape"):
        read_all(tmp_path)


@settings(deadline=None)
@given(st.integers(0, 3), st.floats(0, 1), st.integers(0, 255), st.integers(0, 3))
def test_damage_is_refused_or_read_in_little_memory(tmp_path_factory, kind, at, value, more):
    folder = tmp_path_factory.mktemp("singa")
    data = damaged(BY_HAND * (more + 1), kind, at, value)
    (folder / "step1-worker0.bin").write_bytes(data)
    (folder / "step1-worker1.bin").write_bytes(BY_HAND)
    read_or_refuse(lambda: read_all(folder))


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
floats = hnp.arrays(np.uint32, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6))


@settings(deadline=None, max_examples=30)
@given(st.dictionaries(names, floats, max_size=5), st.integers(1, 5))
def test_any_floats_under_any_names_come_back_bit_for_bit(tmp_path_factory, bits, workers):
    state = {name: array.view("f4") for name, array in bits.items()}
    folder = tmp_path_factory.mktemp("singa")
    gpuckpt.save(folder / "root", state, step=3)
    pieces = max(array.nbytes for array in state.values()) // workers if state else 1
    convert(folder / "root", folder / "singa", to="singa", shard_size=max(pieces, 1), verify=True)
    if state:
        convert(folder / "singa", folder / "again", to="gpuckpt", verify=True)
        found = gpuckpt.load(folder / "again", 3)
        assert {name: array.tobytes() for name, array in found.items()} == {
            name: array.tobytes() for name, array in state.items()
        }


def test_a_number_that_ends_a_message_early_does_not_reach_into_the_next(tmp_path):
    # The blob's last field says 8 bytes of floats, and the blob has 4 left; the file has more.
    blob = b"\x08\x02\x12\x08" + struct.pack("<f", 1)
    data = b"\x22\x01b\x2a" + bytes([len(blob)]) + blob + b"\x18\x01" + b"\x22\x04aaaa"
    (tmp_path / "step1-worker0.bin").write_bytes(data)
    with pytest.raises(CorruptError, match="its message at"):
        read_all(tmp_path)
