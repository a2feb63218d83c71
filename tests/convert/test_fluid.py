"""Fluid's checkpoint directories are read as its sources say, and written so."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import gpuckpt
from gpuckpt.conversion import convert
from gpuckpt.errors import CorruptError, NotFoundError, UnsupportedError
from tests.convert.fluid_files import lod_tensor, selected_rows, tensor, write
from tests.convert.hostile_bytes import damaged, read_all, read_or_refuse

# What Fluid 0.14 saves of a variable of two float32s, byte by byte.
BY_HAND = bytes.fromhex(
    "00000000"  # LoDTensor's version
    "0000000000000000"  # no levels of detail
    "00000000"  # Tensor's version
    "04000000 08 05 10 02"  # TensorDesc, 4 bytes: data_type FP32, dims [2]
    "0000803f 000020c0"  # 1.0, -2.5
)
# And of rows 7 and 2 of a table of 100 rows.
ROWS_BY_HAND = bytes.fromhex(
    "00000000"  # SelectedRows' version
    "0200000000000000 0700000000000000 0200000000000000"  # two rows
    "6400000000000000"  # height
    "00000000"  # Tensor's version
    "06000000 08 05 10 02 10 01"  # FP32, [2, 1]
    "0000803f 000020c0"
)
# And of row 1 of such a table.
ONE_ROW = bytes.fromhex(
    "00000000 0100000000000000 0100000000000000 6400000000000000"
    "00000000 06000000 08 05 10 01 10 01 0000803f"
)
NOW = "Sun Nov 22 22:49:08 2026"


def loaded(folder: Path, step: int) -> Any:
    convert(folder, folder.parent / "loaded", to="gpuckpt", verify=True, force=True)
    return gpuckpt.load(folder.parent / "loaded", step)


def full(folder: Path, lookup: str = "__lookup_table__") -> Path:
    """A checkpoint of two trainers and two parameter servers."""
    return write(
        folder,
        {
            "checkpoint_3/__model__/fc_0.w_0": lod_tensor(np.eye(3, dtype="f4")),
            "checkpoint_3/__model__/var.w_1": BY_HAND,
            "checkpoint_3/__model__/seq": lod_tensor(np.arange(5, dtype="i8"), [0, 2], [0, 1, 5]),
            "checkpoint_3/__model__/_SUCCESS": NOW,
            "checkpoint_3/trainer_0/epoch_id": "2",
            "checkpoint_3/trainer_0/step_id": "40",
            "checkpoint_3/trainer_0/_SUCCESS": NOW,
            "checkpoint_3/trainer_1/epoch_id": "2\n",
            "checkpoint_3/trainer_1/step_id": "41",
            f"checkpoint_3/{lookup}/table_pserver_0": ROWS_BY_HAND,
            f"checkpoint_3/{lookup}/table_pserver_1": selected_rows(
                [1], 100, np.ones((1, 1), "f4")
            ),
        },
    )


@pytest.mark.parametrize("lookup", ["__lookup_table__", "__lockup_table__"])
def test_all_of_a_checkpoint_is_read_in_either_spelling(tmp_path, lookup):
    state = loaded(full(tmp_path / "run", lookup), 3)

    assert state["fc_0.w_0"].tobytes() == np.eye(3, dtype="f4").tobytes()
    assert state["var.w_1"].tolist() == [1.0, -2.5]
    assert [level.tolist() for level in state["__lod__"]["seq"]] == [[0, 2], [0, 1, 5]]
    assert state["trainer_0"] == {"epoch_id": 2, "step_id": 40}
    assert state["trainer_1"] == {"epoch_id": 2, "step_id": 41}
    tables = state["__lookup_table__"]
    assert tables["table_pserver_0"]["rows"].tolist() == [7, 2]
    assert tables["table_pserver_0"]["height"] == 100
    assert tables["table_pserver_1"]["value"].tolist() == [[1.0]]


def test_what_was_read_is_written_again_byte_for_byte(tmp_path):
    full(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "root", to="gpuckpt", verify=True)
    convert(tmp_path / "root", tmp_path / "again", to="fluid", verify=True, strict=True)

    before = {p.relative_to(tmp_path / "run"): p for p in (tmp_path / "run").rglob("*")}
    after = {p.relative_to(tmp_path / "again"): p for p in (tmp_path / "again").rglob("*")}
    after.pop(Path("checkpoint_3/gpuckpt.checksums.json"))
    marks = {path for path in after if path.name == "_SUCCESS"}
    assert {path for path in before if path.name != "_SUCCESS"} == after.keys() - marks
    assert {str(path.parent.name) for path in marks} == {"__model__", "trainer_0", "trainer_1"}
    for path in after.keys() - marks:
        if after[path].is_file():
            assert after[path].read_bytes().strip() == before[path].read_bytes().strip(), path


def test_a_variable_is_written_as_these_bytes(tmp_path):
    gpuckpt.save(tmp_path / "root", {"w": np.array([1.0, -2.5], "f4")}, step=5, epoch=1)
    done = convert(tmp_path / "root", tmp_path / "run", to="fluid", verify=True, strict=True)
    folder = tmp_path / "run" / "checkpoint_5"
    assert (folder / "__model__" / "w").read_bytes() == BY_HAND
    assert (folder / "trainer_0" / "epoch_id").read_text() == "1"
    assert (folder / "trainer_0" / "step_id").read_text() == "5"
    assert done.lost == ()


def test_the_newest_that_was_finished_is_read(tmp_path):
    for serial in (0, 9, 10):
        files = {f"checkpoint_{serial}/__model__/w": lod_tensor(np.full(2, serial, "f4"))}
        done = {f"checkpoint_{serial}/__model__/_SUCCESS": NOW} if serial != 10 else {}
        write(tmp_path, files | done)
    assert read_all(tmp_path)["w"][0] == 9
    assert read_all(tmp_path / "checkpoint_0")["w"][0] == 0


def test_one_that_was_not_finished_is_read_only_if_it_is_named_and_says_so(tmp_path):
    write(tmp_path / "run", {"checkpoint_4/__model__/w": BY_HAND})
    with pytest.raises(NotFoundError, match="with a _SUCCESS mark; there are 4; to read one"):
        convert(tmp_path / "run", tmp_path / "root", to="gpuckpt")
    done = convert(tmp_path / "run" / "checkpoint_4", tmp_path / "root", to="gpuckpt")
    assert "no _SUCCESS mark" in done.lost[0]
    with pytest.raises(UnsupportedError, match="no _SUCCESS mark"):
        convert(tmp_path / "run" / "checkpoint_4", tmp_path / "other", to="gpuckpt", strict=True)


def test_the_first_layout_which_had_no_model_folder_is_read(tmp_path):
    write(tmp_path, {"checkpoint_0/w": BY_HAND, "checkpoint_0/_SUCCESS": NOW})
    assert list(read_all(tmp_path)) == ["w"]


def test_names_with_slashes_are_folders_as_in_fluid(tmp_path):
    gpuckpt.save(tmp_path / "root", {"scope/fc.w": np.array([1.0, -2.5], "f4")})
    convert(tmp_path / "root", tmp_path / "run", to="fluid", verify=True)
    assert (tmp_path / "run/checkpoint_0/__model__/scope/fc.w").read_bytes() == BY_HAND


def test_a_target_that_is_called_like_one_checkpoint_is_that_one(tmp_path):
    gpuckpt.save(tmp_path / "root", {"w": np.array([1.0, -2.5], "f4")}, step=5)
    convert(tmp_path / "root", tmp_path / "checkpoint_8", verify=True)
    assert (tmp_path / "checkpoint_8" / "__model__" / "w").read_bytes() == BY_HAND


@pytest.mark.parametrize("dtype", ["?", "i1", "i2", "i4", "i8", "u1", "u8", "f2", "f4", "f8"])
def test_every_type_of_fluids_own_is_written_as_its_sources_say(tmp_path, dtype):
    array = np.arange(6).astype(dtype).reshape(2, 3)
    gpuckpt.save(tmp_path / "root", {"w": array})
    convert(tmp_path / "root", tmp_path / "run", to="fluid", verify=True)
    assert (tmp_path / "run/checkpoint_0/__model__/w").read_bytes() == lod_tensor(array)


def test_bfloat16_goes_round_though_it_came_later(tmp_path):
    array = np.arange(6).astype(ml_dtypes.bfloat16)
    gpuckpt.save(tmp_path / "root", {"w": array})
    convert(tmp_path / "root", tmp_path / "run", to="fluid", verify=True)
    assert read_all(tmp_path / "run")["w"].tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"w": np.zeros(2, ml_dtypes.float8_e5m2)}, "w: Fluid has no type for float8_e5m2"),
        ({"w": np.zeros(2, ">f4")}, "w: Fluid has no type for >float32"),
        ({"_SUCCESS": np.zeros(2)}, "_SUCCESS: no file can be called so"),
        ({"../w": np.zeros(2)}, r"\.\./w: no file can be called so"),
        ({"/w": np.zeros(2)}, "/w: no file can be called so"),
        ({"": np.zeros(2)}, "no file can be called so"),
        ({".w": np.zeros(2)}, "begin with a dot"),
        ({"w" * 256: np.zeros(2)}, "no file can be called so"),
        ({"w": np.zeros(2), "w/b": np.zeros(2)}, "w/b: w would be a file and a folder"),
        ({"w": np.zeros(1), "trainer_0": {"../x": 1}}, "no file can be called so"),
    ],
)
def test_what_no_file_can_hold_is_refused_before_anything_is_written(tmp_path, state, reason):
    gpuckpt.save(tmp_path / "root", state)
    with pytest.raises(UnsupportedError, match=reason):
        convert(tmp_path / "root", tmp_path / "run", to="fluid")
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_values_that_are_not_a_trainers_are_told_as_lost(tmp_path):
    state = {"w": np.zeros(2), "lr": 0.1, "trainer_0": {"epoch_id": 1}}
    gpuckpt.save(tmp_path / "root", state)
    done = convert(tmp_path / "root", tmp_path / "run", to="fluid", verify=True)
    assert done.lost == ("lr: a value, not an array",)
    assert (tmp_path / "run/checkpoint_0/trainer_0/epoch_id").read_text() == "1"
    assert not (tmp_path / "run/checkpoint_0/trainer_0/step_id").exists()


def test_dicts_that_only_look_like_rows_stay_variables(tmp_path):
    state = {
        "short": {"rows": np.arange(3), "height": 9, "value": np.zeros((2, 1))},
        "floats": {"rows": np.arange(2.0), "height": 9, "value": np.zeros((2, 1))},
        "__lod__": {"nobodys": [np.zeros(2, "u8")]},
        "__lookup_table__": {"flat": np.zeros(2)},
    }
    gpuckpt.save(tmp_path / "root", state)
    done = convert(tmp_path / "root", tmp_path / "run", to="fluid", verify=True)
    assert set(read_all(tmp_path / "run")) == {
        *("short.rows", "short.value", "floats.rows", "floats.value", "__lod__.nobodys.0"),
        "__lookup_table__.flat",
    }
    assert len([one for one in done.lost if "height" in one]) == 2


def test_a_table_in_both_spellings_is_not_guessed_between(tmp_path):
    full(tmp_path)
    write(tmp_path, {"checkpoint_3/__lockup_table__/table_pserver_0": ROWS_BY_HAND})
    with pytest.raises(CorruptError, match="are the table table_pserver_0"):
        read_all(tmp_path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "should follow byte 0"),
        (BY_HAND[:-1], "it ends at 31"),
        (BY_HAND + b"\0", "the file ends at 33"),
        (b"\1" + BY_HAND[1:], "version 1 at byte 0"),
        (BY_HAND[:4] + b"\xff" * 8 + BY_HAND[12:], "levels of detail"),
        (BY_HAND[:4] + struct.pack("<QQ", 1, 1 << 62) + BY_HAND[12:], "should follow byte"),
        (BY_HAND[:16] + struct.pack("<i", -4) + BY_HAND[20:], "a description of -4 bytes"),
        (BY_HAND[:16] + struct.pack("<i", 1 << 30) + BY_HAND[20:], "a description of 1073741824"),
        (BY_HAND.replace(b"\x08\x05", b"\x08\x07"), "elements of type 7"),
        (b"text, no variable", "version"),
    ],
)
def test_a_file_that_is_no_variable_is_refused_by_name(tmp_path, data, reason):
    write(tmp_path, {"checkpoint_0/__model__/w": data, "checkpoint_0/__model__/_SUCCESS": NOW})
    with pytest.raises(CorruptError, match=reason) as caught:
        read_all(tmp_path)
    assert "__model__/w" in str(caught.value)


def test_more_rows_than_there_are_values_are_refused(tmp_path):
    data = ROWS_BY_HAND[:28] + ROWS_BY_HAND[28:36] + ONE_ROW[28:]
    write(
        tmp_path, {"checkpoint_0/__lookup_table__/t": data, "checkpoint_0/__model__/_SUCCESS": NOW}
    )
    with pytest.raises(CorruptError, match=r"it has 2 rows, and a value of the shape \(1, 1\)"):
        read_all(tmp_path)


@pytest.mark.parametrize("dims", [(-1, 2), (1 << 40, 1 << 40), (1 << 62, 0), (2,) * 65])
def test_a_shape_that_no_array_can_have_is_refused(tmp_path, dims):
    protos = pytest.importorskip("tests.convert.old_protos", reason="needs protobuf")
    desc = protos.TensorDesc(data_type=5, dims=dims).SerializeToString()
    data = BY_HAND[:16] + struct.pack("<i", len(desc)) + desc + bytes(8)
    write(tmp_path, {"checkpoint_0/__model__/w": data, "checkpoint_0/__model__/_SUCCESS": NOW})
    with pytest.raises(CorruptError, match=r"the shape .*… at byte"):
        read_all(tmp_path)


@settings(deadline=None)
@given(st.integers(0, 3), st.floats(0, 1), st.integers(0, 255), st.booleans())
def test_damage_is_refused_or_read_in_little_memory(tmp_path_factory, kind, at, value, rows):
    folder = tmp_path_factory.mktemp("fluid")
    sequences = lod_tensor(np.arange(4, dtype="f4"), [0, 2], [0, 1, 4])
    data = damaged(ROWS_BY_HAND if rows else sequences, kind, at, value)
    write(
        folder,
        {
            "checkpoint_0/__model__/w": data,
            "checkpoint_0/__model__/_SUCCESS": NOW,
            "checkpoint_0/__lookup_table__/t_0": data,
            "checkpoint_0/trainer_0/step_id": data[:9],
        },
    )
    read_or_refuse(lambda: read_all(folder))


names = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=20
).filter(lambda name: not name.startswith((".", "_")))
kinds = st.sampled_from(["?", "i1", "i2", "i4", "i8", "u1", "u8", "f2", "f4", "f8", "c8", "c16"])
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


@settings(deadline=None, max_examples=30)
@given(st.dictionaries(names, st.tuples(kinds, shapes), max_size=5), st.data())
def test_any_arrays_come_back_bit_for_bit(tmp_path_factory, wanted, data):
    folder = tmp_path_factory.mktemp("fluid")
    state = {}
    for name, (kind, shape) in wanted.items():
        count = int(np.prod(shape)) * np.dtype(kind).itemsize
        raw = data.draw(st.binary(min_size=count, max_size=count))
        raw = bytes(byte & 1 for byte in raw) if kind == "?" else raw
        state[name] = np.frombuffer(raw, kind).reshape(shape)
    gpuckpt.save(folder / "root", state, step=3)
    convert(folder / "root", folder / "run", to="fluid", verify=True)
    convert(folder / "run", folder / "again", to="gpuckpt", verify=True)
    found = gpuckpt.load(folder / "again", 3)
    assert found.pop("trainer_0") == {"epoch_id": 0, "step_id": 3}
    assert {n: (a.dtype, a.shape, a.tobytes()) for n, a in found.items()} == {
        n: (a.dtype, a.shape, a.tobytes()) for n, a in state.items()
    }


def test_the_independent_writer_agrees_with_the_bytes_by_hand():
    assert lod_tensor(np.array([1.0, -2.5], "f4")) == BY_HAND
    value = np.array([[1.0], [-2.5]], "f4")
    assert selected_rows([7, 2], 100, value) == ROWS_BY_HAND
    assert tensor(value) == ROWS_BY_HAND[36:]
