"""Files of torch.save: states with tied tensors go both ways, and no code is run."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.conversion.torch_file import DTYPES, TORCH
from gpuckpt.dtypes import to_numpy
from gpuckpt.errors import CorruptError, UnsupportedError
from tests.convert.states import read, training_state, written
from tests.strategies import arrays, floats, same

torch = pytest.importorskip("torch", reason="torch isn't installed")

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
leaves = st.one_of(
    arrays(st.sampled_from([to_numpy(name) for name in DTYPES])),
    *(st.none(), st.booleans(), st.integers(), floats(), names, st.binary(max_size=5)),
)
states = st.dictionaries(
    st.one_of(names, st.integers(-9, 9)),
    st.recursive(
        leaves,
        lambda inner: st.one_of(
            *(st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple)),
            st.dictionaries(names, inner, max_size=3),
        ),
        max_leaves=6,
    ),
    max_size=4,
)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(states)
def test_any_state_of_torchs_types_goes_there_and_back(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("any") / "x.pt"
    try:
        written(state, TORCH, path)
    except UnsupportedError as error:
        assert "without code" in str(error)  # noqa: PT017 - of empty bytes, and huge numbers
        return
    assert same(read(path, TORCH), state)


def test_torch_reads_what_is_written_with_ties_and_nothing_but_weights(tmp_path):
    state = training_state()
    path = written(state, TORCH, tmp_path / "x.pt")

    found = torch.load(path, weights_only=True)

    model = found["model"]
    assert model["w"].data_ptr() == model["tied"].data_ptr()
    assert model["half"].dtype == torch.bfloat16
    assert model["small"].dtype == torch.float8_e4m3fn
    assert model["none"].shape == (0, 3)
    assert found["optimizer"][3][1] == ("a", None, 0.1, 7)
    assert np.array_equal(model["w"].numpy(), state["model"]["w"])
    storages = {one.untyped_storage().nbytes() for one in (model["w"], model["mask"])}
    assert storages == {84000, 3}
    assert [one.name for one in tmp_path.iterdir()] == ["x.pt"]


def test_a_training_runs_file_goes_through_a_root_and_back(tmp_path):
    model = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(20)).sum().backward()
    optimizer.step()
    before = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(before, tmp_path / "x.pt")

    gpuckpt.convert(tmp_path / "x.pt", tmp_path / "run", verify=True, strict=True)
    found = gpuckpt.load(tmp_path / "run")
    gpuckpt.convert(tmp_path / "run", tmp_path / "y.pt", verify=True, strict=True)
    after = torch.load(tmp_path / "y.pt", weights_only=True)

    assert isinstance(found["model"]["0.weight"], torch.Tensor)
    assert found["model"]["0.weight"] is found["model"]["1.weight"]
    model.load_state_dict(after["model"])
    optimizer.load_state_dict(after["optimizer"])
    assert after["epoch"] == 3
    assert flat(after) == flat(before)


def flat(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return str(tree.dtype), tuple(tree.shape), tree.numpy().tobytes()
    if isinstance(tree, dict):
        return {key: flat(child) for key, child in tree.items()}
    return [flat(child) for child in tree] if isinstance(tree, list | tuple) else tree


def test_views_of_one_storage_are_converted_each_for_itself(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save({"whole": whole, "column": whole[:, 1], "turned": whole.T}, tmp_path / "x.pt")

    gpuckpt.convert(tmp_path / "x.pt", tmp_path / "x.npz", verify=True)

    with np.load(tmp_path / "x.npz") as found:
        assert found["column"].tolist() == [1, 5, 9]
        assert np.array_equal(found["turned"], whole.numpy().T)


@pytest.mark.parametrize("new", [True, False])
def test_both_of_torchs_formats_and_ordered_dicts_and_parameters_are_read(new, tmp_path):
    state = OrderedDict(w=torch.nn.Parameter(torch.ones(3)), b=torch.zeros(2, dtype=torch.bfloat16))
    torch.save(state, tmp_path / "x.bin", _use_new_zipfile_serialization=new)

    gpuckpt.convert(tmp_path / "x.bin", tmp_path / "run", verify=True)

    assert gpuckpt.load(tmp_path / "run", like="numpy")["w"].tolist() == [1, 1, 1]


class Evil:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


def test_code_in_a_file_isnt_run(tmp_path):
    torch.save({"w": torch.zeros(1), "e": Evil(tmp_path / "owned")}, tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Evil(tmp_path / "owned"), protocol=2))
    for name in ("x.pt", "y.pt"):
        with pytest.raises(CorruptError, match="state_dict alone"):
            gpuckpt.convert(tmp_path / name, tmp_path / "run")
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "run").exists()


def test_a_damaged_file_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptError, match="torch doesn't read it"):
        gpuckpt.convert(tmp_path / "x.pt", tmp_path / "run")


@pytest.mark.parametrize("dtype", [">float32", "int4", "U5", "datetime64[ns]", "float6_e2m3fn"])
def test_elements_that_torch_lacks_are_refused_by_name(dtype, tmp_path):
    with pytest.raises(UnsupportedError, match=r"deep\.one"):
        written({"deep": {"one": np.zeros(2, to_numpy(dtype))}}, TORCH, tmp_path / "x.pt")


def test_what_torch_has_no_place_for_is_told(tmp_path):
    state = {"w": np.zeros(2), "lr": np.float32(0.5)}
    gpuckpt.save(tmp_path / "run", state, 3, metrics={"loss": 1.0})

    done = gpuckpt.convert(tmp_path / "run", tmp_path / "x.pt")

    assert len(done.lost) == 2
    assert "lr" in done.lost[0]
    assert "metrics" in done.lost[1]
    assert torch.load(tmp_path / "x.pt", weights_only=True)["lr"] == 0.5
    more: list[Any] = [{"deep": [b""]}, {"deep": {(1, b""): 2}}]
    for one in more:
        with pytest.raises(UnsupportedError, match="code"):
            written(one, TORCH, tmp_path / "y.pt")
    with pytest.raises(UnsupportedError, match="when"):
        written({"when": np.datetime64("2020-01-01")}, TORCH, tmp_path / "y.pt")
