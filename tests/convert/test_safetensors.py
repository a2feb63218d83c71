"""safetensors: files that others read, and files of strangers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import composite

import gpuckpt
from gpuckpt.conversion.safetensors import SAFETENSORS
from gpuckpt.conversion.safetensors_header import (
    DTYPES,
    HEADER_NBYTES_MAX,
    Header,
    file_order,
    pack_header,
    unpack_header,
)
from gpuckpt.dtypes import to_numpy
from gpuckpt.errors import CorruptError, InvalidError, UnsupportedError
from gpuckpt.spec import Spec
from tests.convert.states import read, training_state, written
from tests.strategies import arrays, keys, plain_values, same, shapes

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
held = st.sampled_from([to_numpy(name) for name in DTYPES.values()])


@composite
def held_states(draw: st.DrawFn) -> Any:
    """States whose arrays are of types that a file can hold, and values of any kind."""
    leaf = st.one_of(arrays(held), plain_values())
    inner = st.recursive(
        leaf,
        lambda one: st.one_of(
            st.dictionaries(keys(), one, max_size=3), st.lists(one, max_size=3).map(tuple)
        ),
        max_leaves=6,
    )
    return draw(st.dictionaries(names, inner, max_size=4))


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def row(dtype: str, shape: list[int], first: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(held_states())
def test_any_state_of_such_arrays_goes_there_and_back(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    try:
        written(state, SAFETENSORS, path)
    except UnsupportedError as error:
        assert "name" in error.reason or "name" in str(error)  # noqa: PT017 - of a surrogate
        return
    assert same(read(path, SAFETENSORS), state)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(names.filter(lambda name: name != "__metadata__"), st.tuples(held, shapes())),
    st.dictionaries(names, names, max_size=3),
)
def test_a_header_comes_back(tensors, metadata):
    specs = [Spec(name, dtype.name, shape) for name, (dtype, shape) in tensors.items()]
    specs = [specs[at] for at in file_order(specs)]

    packed = pack_header(specs, metadata)
    nbytes = len(packed) + sum(spec.nbytes for spec in specs)

    assert len(packed) % 8 == 0
    found = unpack_header(packed[8:], nbytes, "x")
    assert found.specs == tuple(specs)
    assert found.metadata == metadata
    assert all(
        offset % to_numpy(spec.dtype).itemsize == 0
        for spec, offset in zip(found.specs, found.offsets, strict=True)
    )


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 500))
def test_no_bytes_make_the_reader_raise_anything_but_its_own_errors(text, more):
    try:
        found = unpack_header(b"{" + text, len(text) + 9 + more, "x")
    except (CorruptError, UnsupportedError):
        return
    assert isinstance(found, Header)


def test_the_library_reads_what_is_written(tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason="safetensors isn't installed")
    state = {
        name: np.arange(6).astype(dtype).reshape(2, 3)
        for name, dtype in (("a", "f4"), ("b", "i8"), ("c", "u1"), ("d", "?"), ("e", "f2"))
    } | {"z": np.array(2.5), "none": np.empty((3, 0), np.float32)}
    path = written(state, SAFETENSORS, tmp_path / "x.safetensors")

    assert {name: same(array, state[name]) for name, array in library.load_file(path).items()} == (
        dict.fromkeys(state, True)
    )
    assert path.read_bytes() == library.save(state)


def test_every_type_is_the_same_to_torchs_reader_and_comes_back_from_its_writer(tmp_path):
    torch = pytest.importorskip("torch", reason="torch isn't installed")
    library = pytest.importorskip("safetensors.torch", reason="safetensors isn't installed")
    bits = np.random.default_rng(0).integers(0, 2, 64, np.uint8)
    state = {name: bits.view(to_numpy(name)) for name in DTYPES.values()}
    path = written(state, SAFETENSORS, tmp_path / "x.safetensors")

    found = library.load_file(path)

    assert {name: str(one.dtype) for name, one in found.items()} == {
        name: f"torch.{name}" for name in state
    }
    for name, one in found.items():
        assert one.view(torch.uint8).numpy().tobytes() == state[name].tobytes()
    library.save_file(found, tmp_path / "y.safetensors")
    assert same(read(tmp_path / "y.safetensors", SAFETENSORS), read(path, SAFETENSORS))
    assert path.read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_tied_weights_are_noted_as_the_library_does_for_models(tmp_path):
    pytest.importorskip("safetensors.torch", reason="safetensors isn't installed")
    torch = pytest.importorskip("torch", reason="torch isn't installed")
    from safetensors.torch import load_model, save_model

    class Tied(torch.nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Linear(3, 3, bias=False)
            self.b = torch.nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    model, other = Tied(), Tied()
    save_model(model, tmp_path / "x.safetensors")
    gpuckpt.convert(tmp_path / "x.safetensors", tmp_path / "run")
    found = gpuckpt.load(tmp_path / "run")
    assert found["a.weight"] is found["b.weight"]

    gpuckpt.convert(tmp_path / "run", tmp_path / "y.safetensors")
    load_model(other, tmp_path / "y.safetensors")
    assert torch.equal(other.b.weight, model.a.weight)


def test_transformers_finds_the_metadata_that_it_asks_for(tmp_path):
    gpuckpt.save(tmp_path / "run", training_state(), 3)
    gpuckpt.convert(tmp_path / "run", tmp_path / "x.safetensors")

    data = (tmp_path / "x.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])

    assert header["__metadata__"]["format"] == "pt"
    assert header["__metadata__"]["model.tied"] == "model.w"
    assert header["model.half"]["dtype"] == "BF16"


def test_shards_are_as_large_as_asked_for_and_the_index_names_them(tmp_path):
    state = {f"w{at}": np.full(100, at, np.float32) for at in range(5)} | {
        "large": np.zeros(900, np.float32)
    }
    folder = written(state, SAFETENSORS, tmp_path / "dir", shard_nbytes=1000)

    index = json.loads((folder / "model.safetensors.index.json").read_text())

    assert index["metadata"]["total_size"] == 5600
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-0000{at}-of-00004.safetensors" for at in (1, 2, 3, 4)]
    assert index["weight_map"]["w0"] == index["weight_map"]["w1"] == files[0]
    assert index["weight_map"]["large"] == files[3]
    assert same(read(folder, SAFETENSORS), state)
    assert same(read(folder / "model.safetensors.index.json", SAFETENSORS), state)


def test_one_shard_needs_no_index(tmp_path):
    folder = written({"w": np.zeros(9)}, SAFETENSORS, tmp_path / "dir", shard_nbytes=1000)
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    assert same(read(folder, SAFETENSORS), {"w": np.zeros(9)})


def test_shards_of_one_file_are_refused(tmp_path):
    with pytest.raises(InvalidError, match="directory"):
        written({"w": np.zeros(9)}, SAFETENSORS, tmp_path / "x.safetensors", shard_nbytes=9)


def test_a_cache_of_links_is_read(tmp_path):
    """As Hugging Face's is: names are links to blobs in another folder."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    folder = written(training_state(), SAFETENSORS, tmp_path / "dir", shard_nbytes=50_000)
    blobs.mkdir()
    snapshot.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..") / "blobs" / str(number))

    assert same(read(snapshot, SAFETENSORS), training_state())
    index = snapshot / "model.safetensors.index.json"
    assert same(read(index, SAFETENSORS), training_state())


def test_a_directory_of_several_files_without_an_index_isnt_guessed_at(tmp_path):
    for name in ("a", "b"):
        written({"w": np.zeros(1)}, SAFETENSORS, tmp_path / f"{name}.safetensors")
    with pytest.raises(InvalidError, match="2 safetensors files"):
        read(tmp_path, SAFETENSORS)


@pytest.mark.parametrize("dtype", [">float32", "int4", "U5", "complex128", "datetime64[ns]"])
def test_elements_that_the_format_lacks_are_refused_by_name(dtype, tmp_path):
    state = {"deep": {"one": np.zeros(2, to_numpy(dtype))}}
    with pytest.raises(UnsupportedError, match=r"deep\.one"):
        written(state, SAFETENSORS, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_elements_of_less_than_a_byte_are_refused_by_name(dtype, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw({"w": row(dtype, [8], 0, 4)}, bytes(4)))
    with pytest.raises(UnsupportedError, match=f"w: .*{dtype}"):
        read(path, SAFETENSORS)


ONE = row("F32", [2], 0, 8)
HOSTILE = {
    "empty": b"",
    "short": b"1234567",
    "header longer than the file": raw({"w": ONE}, bytes(8), 10_000),
    "header longer than allowed": raw(b"{}", b"", HEADER_NBYTES_MAX + 1),
    "header of a length that nobody has room for": raw(b"{}", b"", 2**62),
    "no object": raw(b"[1]"),
    "no JSON": raw(b"{nothing"),
    "not UTF-8": raw(b'{"\xff": 1}'),
    "a space first": raw(b" {}"),
    "a key twice": raw(b'{"w":%s,"w":%s}' % ((json.dumps(ONE).encode(),) * 2), bytes(8)),
    "a hole": raw({"a": ONE, "b": row("F32", [2], 12, 20)}, bytes(20)),
    "an overlap": raw({"a": ONE, "b": row("F32", [2], 4, 12)}, bytes(12)),
    "an overlap and a hole": raw({"a": ONE, "b": row("F32", [2], 4, 12)}, bytes(16)),
    "more elements than bytes": raw({"a": row("F32", [3], 0, 8)}, bytes(12)),
    "a late beginning": raw({"a": row("F32", [2], 4, 12)}, bytes(12)),
    "bytes at the end": raw({"a": ONE}, bytes(9)),
    "bytes missing": raw({"a": ONE}, bytes(7)),
    "another length": raw({"a": row("F32", [3], 0, 8)}, bytes(8)),
    "a negative shape": raw({"a": row("F32", [-2], 0, 8)}, bytes(8)),
    "a shape of floats": raw({"a": row("F32", [2.0], 0, 8)}, bytes(8)),  # type: ignore[list-item]
    "too many axes": raw({"a": row("U8", [1] * 65, 0, 1)}, bytes(1)),
    "an unknown type": raw({"a": row("F5", [2], 0, 8)}, bytes(8)),
    "another field": raw({"a": ONE | {"more": 1}}, bytes(8)),
    "no offsets": raw({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "metadata of numbers": raw({"__metadata__": {"a": 1}, "w": ONE}, bytes(8)),
    "metadata that is a list": raw({"__metadata__": [], "w": ONE}, bytes(8)),
    "a surrogate": raw(b'{"\\ud800":%s}' % json.dumps(ONE).encode(), bytes(8)),
    "a deep nest": raw(b'{"a":' * 100_000),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_that_isnt_one_is_refused(what, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[what])
    with pytest.raises(CorruptError, match=r"x\.safetensors"):
        read(path, SAFETENSORS)


def test_a_huge_shape_without_elements_takes_no_memory(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw({"a": row("F32", [2**40, 0], 0, 0)}))
    assert read(path, SAFETENSORS)["a"].shape == (2**40, 0)


@pytest.mark.parametrize(
    "index",
    [
        *([], {}, {"weight_map": []}, {"weight_map": {"w": 1}}),
        {"weight_map": {"w": "../x.safetensors"}},
        {"weight_map": {"w": "/etc/passwd"}},
        {"weight_map": {"w": "x.bin"}},
        {"weight_map": {"v": "x.safetensors"}},
        {"weight_map": {"w": "x.safetensors", "v": "x.safetensors"}},
    ],
)
def test_an_index_that_doesnt_fit_its_files_is_refused(index, tmp_path):
    written({"w": np.zeros(2)}, SAFETENSORS, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptError, match="index"):
        read(tmp_path, SAFETENSORS)


def test_a_structure_that_was_noted_and_doesnt_fit_any_more_is_left_and_told(tmp_path):
    path = written(training_state(), SAFETENSORS, tmp_path / "x.safetensors")
    for damage in (("model.half", "model.halb"), ('\\"tensor\\":1', '\\"tensor\\":99')):
        data = path.read_bytes().replace(damage[0].encode(), damage[1].encode())
        (tmp_path / "y.safetensors").write_bytes(
            (len(data) - len(path.read_bytes()) + int.from_bytes(data[:8], "little")).to_bytes(
                8, "little"
            )
            + data[8:]
        )
        if damage[0] == "model.half":  # everywhere: then it fits again
            gpuckpt.convert(tmp_path / "y.safetensors", tmp_path / "a")
            continue
        done = gpuckpt.convert(tmp_path / "y.safetensors", tmp_path / "b")
        assert "flat dict" in done.lost[0]
        assert "model.w" in gpuckpt.load(tmp_path / "b")


def test_a_pipe_in_the_place_of_a_file_isnt_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(gpuckpt.CheckpointError, match=r"x\.safetensors"):
        read(tmp_path / "x.safetensors", SAFETENSORS)


def test_bfloat16_keeps_its_bits(tmp_path):
    state = {"w": np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)}
    assert same(read(written(state, SAFETENSORS, tmp_path / "x.safetensors"), SAFETENSORS), state)
