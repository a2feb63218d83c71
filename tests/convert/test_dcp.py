"""torch.distributed.checkpoint's directories are read without running anything, and written."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.boxes import Box
from gpuckpt.conversion import convert
from gpuckpt.conversion.opcodes import read_pickle
from gpuckpt.errors import CheckpointError, CorruptError, UnsupportedError
from tests.convert.hostile_bytes import damaged, read_all, read_or_refuse

GOLDEN = Path(__file__).parent / "golden" / "dcp"


def by_torch(folder: Path, state: dict[str, Any]) -> Path:
    """A directory as torch saves it."""
    torch = pytest.importorskip("torch", reason="needs torch")
    import torch.distributed.checkpoint as dcp

    assert torch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def into_torch(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """A state that torch has filled from a directory."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def loaded(tmp_path: Path, folder: Path) -> Any:
    convert(folder, tmp_path / "loaded", to="gpuckpt", verify=True, force=True)
    return gpuckpt.load(tmp_path / "loaded")


def bits(tensor: Any) -> bytes:
    torch = pytest.importorskip("torch", reason="needs torch")
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def test_a_directory_of_torch_2_13_is_read_without_torch():
    found = read_all(GOLDEN)
    assert found["model.w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["model.b"].astype(float).tolist() == [1.5, -2.0]
    code = "import sys, gpuckpt.conversion as c; c.convert(*sys.argv[1:], verify=True, to='npz')"
    target = GOLDEN.parent / "never.npz"
    text = f"{code}; assert 'torch' not in sys.modules, 'torch'"
    try:
        subprocess.run([sys.executable, "-c", text, GOLDEN, target], check=True, timeout=60)
    finally:
        target.unlink(missing_ok=True)


def test_every_kind_of_tensor_and_the_nesting_come_back(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch")
    state: dict[str, Any] = {
        "model": {
            "w": torch.randn(5, 7),
            "half": torch.randn(3).half(),
            "b16": torch.randn(3, 2).bfloat16(),
            "f8": torch.randn(9).to(torch.float8_e4m3fn),
            "last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
            "view": torch.arange(10)[3:7],
            "scalar": torch.tensor(2.5, dtype=torch.float64),
            "none": torch.zeros(0, 3),
            "bool": torch.tensor([True, False]),
            "complex": torch.randn(2, dtype=torch.complex64),
            "u16": torch.arange(3).to(torch.uint16),
        },
        "list": [torch.ones(2), {"x": torch.zeros(1, dtype=torch.int8)}],
        "groups": [{"lr": 0.1, "betas": (0.9, 0.99), "name": None, "raw": b"\x00\xff"}],
        "step": 12345678901234567890,
    }
    found = loaded(tmp_path, by_torch(tmp_path / "dcp", state))
    assert found["groups"] == state["groups"]
    assert found["step"] == state["step"]
    assert bits(state["list"][1]["x"]) == found["list"][1]["x"].tobytes()
    for name, tensor in state["model"].items():
        assert found["model"][name].tobytes() == bits(tensor), name
        assert found["model"][name].shape == tuple(tensor.shape), name


def test_what_is_written_torch_loads_bit_for_bit(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch")
    tied = np.arange(6, dtype="f4").reshape(2, 3)
    state: dict[str, Any] = {
        "model": {"w": tied, "head": tied, "b": np.ones(3, ml_dtypes.bfloat16)},
        "opt": [{"m": np.zeros((2, 2))}, {"m": np.ones(())}],
        "lr": 0.5,
    }
    gpuckpt.save(tmp_path / "root", state, step=9)
    done = convert(tmp_path / "root", tmp_path / "dcp", to="dcp", verify=True)
    target: dict[str, Any] = {
        "model": {"w": torch.zeros(2, 3), "head": torch.zeros(2, 3)},
        "opt": [{"m": torch.zeros(2, 2)}, {"m": torch.zeros((), dtype=torch.float64)}],
        "lr": 0.0,
    }
    target["model"]["b"] = torch.zeros(3, dtype=torch.bfloat16)
    found = into_torch(tmp_path / "dcp", target)
    assert found["lr"] == 0.5
    for name in ("w", "head", "b"):
        assert bits(found["model"][name]) == state["model"][name].tobytes()
    assert found["opt"][1]["m"].item() == 1
    assert "step, epoch and metrics" in done.lost
    assert "model.head and model.w" in done.lost[0]


def test_what_dcp_takes_for_something_else_is_told(tmp_path):
    pytest.importorskip("torch", reason="needs torch")
    state = {"s": {0: {"m": np.ones(2)}}, "t": (np.ones(1), 2), "e": {}, "plain": (1, 2)}
    gpuckpt.save(tmp_path / "root", state)
    done = convert(tmp_path / "root", tmp_path / "dcp", to="dcp", verify=True)
    assert [line for line in done.lost if "step" not in line] == [
        "that keys are numbers, say: they become text",
        "that tuples with tensors in them are tuples: they become lists",
        "dicts with nothing in them",
    ]
    found = loaded(tmp_path, tmp_path / "dcp")
    assert found["plain"] == (1, 2)
    assert list(found["s"]) == ["0"]
    assert found["t"][1] == 2


def test_names_that_dcp_would_mix_up_are_refused(tmp_path):
    state = {"a.b": np.ones(1), "a": {"b": np.zeros(1)}}
    gpuckpt.save(tmp_path / "root", state)
    with pytest.raises(UnsupportedError, match=r"for DCP it is a\.b"):
        convert(tmp_path / "root", tmp_path / "dcp", to="dcp")
    assert not (tmp_path / "dcp").exists()


@pytest.mark.parametrize("state", [[np.ones(2)], {"w": np.zeros(2, ">f4")}])
def test_what_dcp_can_not_hold_is_refused_before_anything_is_written(tmp_path, state):
    gpuckpt.save(tmp_path / "root", state)
    with pytest.raises(UnsupportedError):
        convert(tmp_path / "root", tmp_path / "dcp", to="dcp")
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_a_source_that_fails_while_torch_writes_says_why_itself(tmp_path):
    pytest.importorskip("torch", reason="needs torch")
    gpuckpt.save(tmp_path / "root", {"w": np.arange(5000.0)}, codec="raw")
    files = (tmp_path / "root").iterdir()
    segment = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(segment.read_bytes())
    data[9000] ^= 1
    segment.write_bytes(bytes(data))
    with pytest.raises(CorruptError):
        convert(tmp_path / "root", tmp_path / "dcp", to="dcp")
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


cuts = st.lists(st.integers(1, 6), max_size=3)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_tensors_in_shards_of_any_grid_are_put_together(tmp_path_factory, data):
    torch = pytest.importorskip("torch", reason="needs torch")
    from tests.convert.dcp_files import write_chunked

    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    edges = [sorted({0, n, *data.draw(cuts)} & set(range(n + 1))) for n in shape]
    boxes = [Box((), ())]
    for line in edges:
        boxes = [
            Box((*box.offset, low), (*box.shape, high - low))
            for box in boxes
            for low, high in itertools.pairwise(line)
        ]
    kind = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
    tensor = torch.arange(int(np.prod(shape))).reshape(shape).to(kind)
    folder = write_chunked(tmp_path_factory.mktemp("dcp") / "dcp", {"w": (tensor, boxes)})
    assert read_all(folder)["w"].tobytes() == bits(tensor)


def test_a_long_tensor_in_shards_is_put_together_slab_by_slab(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch")
    from tests.convert.dcp_files import write_chunked

    tensor = torch.randn(3000, 2000)
    boxes = [Box((0, 500 * at), (3000, 500)) for at in range(4)]
    folder = write_chunked(tmp_path / "dcp", {"w": (tensor, boxes)})
    assert read_all(folder)["w"].tobytes() == bits(tensor)


@pytest.mark.parametrize(
    "boxes",
    [
        [Box((0, 0), (2, 3))],
        [Box((0, 0), (2, 3)), Box((1, 0), (2, 3))],
        [Box((0, 0), (2, 3)), Box((2, 0), (2, 2))],
    ],
)
def test_shards_that_are_not_the_whole_once_are_refused(tmp_path, boxes):
    torch = pytest.importorskip("torch", reason="needs torch")
    from tests.convert.dcp_files import write_chunked

    folder = write_chunked(tmp_path / "dcp", {"w": (torch.ones(4, 3), boxes)})
    with pytest.raises(CorruptError, match="aren't the whole of it"):
        read_all(folder)


def test_an_object_that_is_no_plain_value_is_left_out_and_told(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch")
    state = {"w": torch.ones(2), "dtype": torch.float32, "path": Path("x")}
    by_torch(tmp_path / "dcp", state)
    done = convert(tmp_path / "dcp", tmp_path / "root", to="gpuckpt")
    assert len(done.lost) == 2
    assert done.lost[0].startswith("dtype: a torch.float32")
    assert list(gpuckpt.load(tmp_path / "root")) == ["w"]


class Evil:
    """A pickle of it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_read_and_never_run(tmp_path):
    made = tmp_path / "made"
    data = pickle.dumps({"x": Evil(made)})
    read_pickle(data, "it")
    assert not made.exists()
    pickle.loads(data)
    assert made.exists(), "it would have been made"


def test_metadata_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    made = tmp_path / "made"
    (tmp_path / "dcp").mkdir()
    for evil in (Evil(made), {"state_dict_metadata": Evil(made)}):
        (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(evil))
        with pytest.raises(CorruptError, match="not what torch"):
            read_all(tmp_path / "dcp")
    assert not made.exists()


def test_an_object_that_would_run_code_is_left_out_and_runs_nothing(tmp_path):
    made = tmp_path / "made"
    by_torch(tmp_path / "dcp", {"x": Evil(made)})
    done = convert(tmp_path / "dcp", tmp_path / "root", to="gpuckpt")
    assert len(done.lost) == 1
    assert not made.exists()


@pytest.mark.parametrize("file", ["../x.distcp", "/etc/passwd", "a/b", ".."])
def test_files_elsewhere_are_not_looked_at(tmp_path, file):
    torch = pytest.importorskip("torch", reason="needs torch")
    from torch.distributed.checkpoint import FileSystemReader

    folder = by_torch(tmp_path / "dcp", {"w": torch.ones(3)})
    metadata = FileSystemReader(folder).read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = file
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CorruptError, match="is no file beside it"):
        read_all(folder)


def test_what_went_through_an_extension_is_refused_by_name(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch")
    from torch.distributed.checkpoint import FileSystemReader

    folder = by_torch(tmp_path / "dcp", {"w": torch.ones(3)})
    metadata = FileSystemReader(folder).read_metadata()
    for info in metadata.storage_data.values():
        info.transform_descriptors = ["stream.zstd"]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnsupportedError, match="w: it went through an extension"):
        read_all(folder)


def test_flipped_bits_of_a_tensor_are_found_by_its_crc(tmp_path):
    (tmp_path / ".metadata").write_bytes((GOLDEN / ".metadata").read_bytes())
    data = bytearray((GOLDEN / "__0_0.distcp").read_bytes())
    data[data.index(np.arange(6, dtype="f4").tobytes()) + 5] ^= 1
    (tmp_path / "__0_0.distcp").write_bytes(bytes(data))
    with pytest.raises(CorruptError, match="have the CRC-32"):
        read_all(tmp_path)


@pytest.mark.parametrize(
    ("found", "put", "reason"),
    [
        (b"QK\0K\2K\3\x86", b"QK\5K\2K\3\x86", "ends after its storage"),
        (b"K\3K\1\x86", b"K\3K\2\x86", "ends after its storage"),
        (b"\x18\0\0\0\x18\0\0\0", b"\xff\xff\xff\0" * 2, "ends after the archive"),
        (b"little", b"bigger", "only little is read"),
    ],
)
def test_a_tensor_that_does_not_lie_in_its_archive_is_refused(tmp_path, found, put, reason):
    (tmp_path / ".metadata").write_bytes((GOLDEN / ".metadata").read_bytes())
    data = (GOLDEN / "__0_0.distcp").read_bytes()
    assert found in data
    (tmp_path / "__0_0.distcp").write_bytes(data.replace(found, put))
    with pytest.raises(CorruptError, match=reason):
        read_all(tmp_path)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
@settings(deadline=None, max_examples=150)
@given(st.integers(0, 3), st.floats(0, 1), st.integers(0, 255))
def test_damage_is_refused_or_read_in_little_memory(tmp_path_factory, file, kind, at, value):
    folder = tmp_path_factory.mktemp("dcp")
    for path in GOLDEN.iterdir():
        data = path.read_bytes()
        data = damaged(data, kind, at, value) if path.name == file else data
        (folder / path.name).write_bytes(data)
    read_or_refuse(lambda: read_all(folder))


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_pickle_of_data_or_are_refused(data):
    read_or_refuse(lambda: read_pickle(data + b".", "it"))


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=200)
@given(plain, st.integers(2, 5))
def test_plain_values_of_any_pickle_protocol_are_what_they_were(value, protocol):
    from gpuckpt.conversion.plain import plain_node
    from gpuckpt.structure import from_json

    node = plain_node(read_pickle(pickle.dumps(value, protocol), "it"))
    assert from_json(node) == value


@pytest.mark.parametrize(
    "data", [b"", b".", b"((.", b"h\0.", b"0.", b"]]b.", b"}(K\x01u.", b"c\n\n\x81.", b"\x82\x01."]
)
def test_pickles_that_make_no_sense_are_refused(data):
    with pytest.raises(CheckpointError, match="no pickle of plain data"):
        read_pickle(data, "it")


def test_shared_parts_do_not_explode(tmp_path):
    from gpuckpt.conversion.plain import plain_node
    from gpuckpt.values import NotPlainError

    value: list[Any] = [1]
    for _ in range(40):
        value = [value, value]
    with pytest.raises(NotPlainError, match="too large"):
        plain_node(read_pickle(pickle.dumps(value), "it"))
