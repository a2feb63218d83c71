"""Orbax's directories are read by TensorStore, and written by Orbax."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.conversion import convert
from gpuckpt.conversion.orbax import DTYPES
from gpuckpt.dtypes import to_numpy
from gpuckpt.errors import CorruptError, InvalidError, NotFoundError, UnsupportedError
from tests.convert.hostile_bytes import damaged, read_all, read_or_refuse

ocp: Any = None
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ocp = pytest.importorskip("orbax.checkpoint", reason="needs orbax-checkpoint")

pytestmark = pytest.mark.filterwarnings("ignore")


def by_orbax(folder: Path, state: Any, **options) -> Path:
    """A directory as Orbax writes it."""
    ocp.PyTreeCheckpointer(**options).save(folder, state)
    return folder


def loaded(tmp_path: Path, folder: Path, **options) -> Any:
    convert(folder, tmp_path / "loaded", to="gpuckpt", verify=True, force=True, **options)
    return gpuckpt.load(tmp_path / "loaded")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A small directory to damage."""
    state = {"w": np.arange(6.0).reshape(2, 3), "step": 3, "name": "run"}
    return by_orbax(tmp_path_factory.mktemp("orbax") / "one", state)


@pytest.mark.parametrize("options", [{}, {"use_ocdbt": False}, {"use_zarr3": True}])
def test_a_tree_comes_back_with_its_nesting_and_values(tmp_path, options):
    state: dict[str, Any] = {
        "params": {"w": np.arange(6, dtype="f4").reshape(2, 3), "a/b.c": np.ones(2)},
        "list": [np.ones(2, ml_dtypes.bfloat16), {"x": np.zeros((1, 2))}],
        "scalar": np.array(2.5),
        "step": 3,
        "lr": 0.5,
        "on": True,
        "name": "run",
        "none": None,
        "empty": {},
    }
    if not options.get("use_ocdbt", True):
        state["params"]["ab"] = state["params"].pop("a/b.c")
    found = loaded(tmp_path, by_orbax(tmp_path / "orbax", state, **options))
    for key in ("step", "lr", "on", "name", "none", "empty"):
        assert found[key] == state[key], key
        assert type(found[key]) is type(state[key]), key
    for key, array in state["params"].items():
        assert found["params"][key].tobytes() == array.tobytes()
    assert found["list"][0].tobytes() == state["list"][0].tobytes()
    assert found["list"][1]["x"].shape == (1, 2)
    assert found["scalar"].shape == ()


def test_arrays_of_jax_that_are_in_several_pieces_are_put_together(tmp_path):
    jax = pytest.importorskip("jax", reason="needs jax")
    whole = np.arange(24, dtype="f4").reshape(8, 3)
    found = loaded(tmp_path, by_orbax(tmp_path / "orbax", {"w": jax.numpy.asarray(whole)}))
    assert found["w"].tobytes() == whole.tobytes()


def test_a_managers_newest_step_is_read_unless_another_is_named(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (5, 8):
            manager.save(step, args=ocp.args.StandardSave({"w": np.full(2, step)}))
        manager.wait_until_finished()
    assert convert(tmp_path / "run", tmp_path / "newest", to="gpuckpt").step == 8
    assert loaded(tmp_path, tmp_path / "run", step=5)["w"][0] == 5
    with pytest.raises(NotFoundError, match="no step 6 of Orbax's; there are 5, 8"):
        convert(tmp_path / "run", tmp_path / "none", to="gpuckpt", step=6)


def test_a_step_of_several_items_is_a_dict_of_them(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        args = ocp.args.Composite(
            params=ocp.args.StandardSave({"w": np.ones(2)}),
            extra=ocp.args.StandardSave({"step": 7}),
        )
        manager.save(5, args=args)
        manager.wait_until_finished()
    found = loaded(tmp_path, tmp_path / "run")
    assert found["params"]["w"].tolist() == [1, 1]
    assert found["extra"] == {"step": 7}


def test_what_is_written_orbax_restores_bit_for_bit(tmp_path):
    tied = np.arange(6, dtype="f4").reshape(2, 3)
    state: dict[str, Any] = {
        "params": {"w": tied, "head": tied, "b": np.ones(3, ml_dtypes.bfloat16)},
        "opt": [{"m": np.zeros((2, 2))}, np.array(7)],
        "lr": 0.5,
        "name": "run",
    }
    gpuckpt.save(tmp_path / "root", state, step=9)
    done = convert(tmp_path / "root", tmp_path / "orbax", to="orbax", verify=True)
    found = ocp.PyTreeCheckpointer().restore(tmp_path / "orbax")
    assert (found["lr"], found["name"]) == (0.5, "run")
    for name, array in state["params"].items():
        assert np.asarray(found["params"][name]).tobytes() == array.tobytes()
    assert np.asarray(found["opt"][1]) == 7
    assert [line.split(":")[0] for line in done.lost] == [
        "that names are of one array; each gets its own",
        "step, epoch and metrics",
    ]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_type_goes_round(tmp_path, dtype):
    array = np.arange(4).astype(to_numpy(dtype)).reshape(2, 2)
    gpuckpt.save(tmp_path / "root", {"w": array})
    convert(tmp_path / "root", tmp_path / "orbax", to="orbax", verify=True)
    assert read_all(tmp_path / "orbax")["w"].tobytes() == array.tobytes()


def test_a_long_array_comes_in_parts(tmp_path):
    array = np.random.default_rng(0).standard_normal((5000, 1000)).astype("f4")
    assert read_all(by_orbax(tmp_path / "orbax", {"w": array}))["w"].tobytes() == array.tobytes()


def test_what_orbax_takes_for_something_else_is_told(tmp_path):
    state = {
        "s": {0: np.ones(2)},
        "t": (np.ones(1), 2),
        "raw": b"x",
        "big": 1 << 70,
        "l": [1 + 2j, np.ones(1)],
    }
    gpuckpt.save(tmp_path / "root", state)
    done = convert(tmp_path / "root", tmp_path / "orbax", to="orbax", verify=True)
    assert set(done.lost) == {
        "raw: Orbax has no place for a bytes",
        "big: Orbax has no place for an int of so many digits",
        "l.0: Orbax has no place for a complex",
        "that keys are numbers, say: they become text",
        "that tuples are tuples: they become lists",
        "step, epoch and metrics",
    }


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"w": np.zeros((0, 2))}, "no arrays without elements"),
        ({"w": np.zeros(2, ">f4")}, "Orbax has no arrays of >float32"),
        ({"a.b": np.ones(1), "a": {"b": np.zeros(1)}}, r"for Orbax it is a\.b"),
    ],
)
def test_what_orbax_can_not_hold_is_refused_before_anything_is_written(tmp_path, state, reason):
    gpuckpt.save(tmp_path / "root", state)
    with pytest.raises(UnsupportedError, match=reason):
        convert(tmp_path / "root", tmp_path / "orbax", to="orbax")
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_without_tensorstore_it_says_what_to_install(tmp_path, written, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorstore", None)
    with pytest.raises(InvalidError, match=r"pip install 'gpuckpt\[orbax\]'"):
        convert(written, tmp_path / "root", to="gpuckpt")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tree: tree.pop("tree_metadata"), "has no tree"),
        (lambda tree: tree["tree_metadata"].update(x=3), "not what Orbax writes"),
        (lambda tree: tree["tree_metadata"].update(x=entry("gone")), "not what Orbax writes"),
        (lambda tree: tree["tree_metadata"].update(x=entry("w", "x")), "makes no sense"),
        (lambda tree: tree.update(use_ocdbt=False), "not what Orbax writes"),
    ],
)
def test_a_tree_that_is_not_orbaxs_is_refused(tmp_path, written, change, reason):
    shutil.copytree(written, tmp_path / "one")
    tree = json.loads((tmp_path / "one" / "_METADATA").read_text())
    change(tree)
    (tmp_path / "one" / "_METADATA").write_text(json.dumps(tree))
    with pytest.raises(CorruptError, match=reason):
        read_all(tmp_path / "one")


def entry(*keys: str) -> dict[str, Any]:
    return {
        "key_metadata": [{"key": key, "key_type": 2} for key in keys],
        "value_metadata": {"value_type": "None" if len(keys) > 1 else "np.ndarray"},
    }


def test_an_array_whose_data_is_gone_is_not_taken_for_zeros(tmp_path):
    folder = by_orbax(tmp_path / "orbax", {"w": np.ones((4, 4))}, use_ocdbt=False)
    (folder / "w" / "0.0").unlink()
    with pytest.raises(CorruptError, match="w: not what Orbax writes"):
        read_all(folder)


def test_names_do_not_lead_out_of_the_directory(tmp_path):
    folder = by_orbax(tmp_path / "orbax", {"w": np.ones(2)}, use_ocdbt=False)
    tree = json.loads((folder / "_METADATA").read_text())
    tree["tree_metadata"]["x"] = entry("../orbax/w")
    (folder / "_METADATA").write_text(json.dumps(tree))
    with pytest.raises(CorruptError, match="is no folder beside it"):
        read_all(folder)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 60), st.tuples(st.integers(0, 3), st.floats(0, 1), st.integers(0, 255)))
def test_damage_is_refused_or_read(tmp_path_factory, written, which, how):
    folder = tmp_path_factory.mktemp("damaged") / "one"
    shutil.copytree(written, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = files[which % len(files)]
    path.write_bytes(damaged(path.read_bytes(), *how))
    read_or_refuse(lambda: read_all(folder))
