"""States go through every format, and come back bit for bit; or are refused by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import gpuckpt
from gpuckpt.errors import UnsupportedError
from tests.strategies import same

pytestmark = pytest.mark.filterwarnings("ignore")

NEEDED = {"x.pt": "torch", "dcp": "torch", "orbax": "orbax"}
TARGETS = {
    **dict.fromkeys(("x.safetensors", "x.npz", "x.pt")),
    "shards": "safetensors",
    **{name: name for name in ("dcp", "orbax", "singa", "fluid", "gpuckpt")},
}
# These note that two names are of one array; in the others each gets its own.
KEEP_TIES = ("x.safetensors", "x.npz", "x.pt", "shards", "gpuckpt")


def through(name: str, state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A state that went into a format, by safetensors into the next one, and back."""
    if name in NEEDED and importlib.util.find_spec(NEEDED[name]) is None:
        pytest.skip(f"needs {NEEDED[name]}")
    gpuckpt.save(folder / "run", state, 3)
    shard = 600 if name == "shards" else None
    options: dict[str, Any] = {"to": TARGETS[name], "shard_size": shard, "verify": True}
    gpuckpt.convert(folder / "run", folder / name, **options)
    if shard:
        assert (folder / name / "model.safetensors.index.json").is_file()
    gpuckpt.convert(folder / name, folder / "between.safetensors", verify=True)
    done = gpuckpt.convert(folder / "between.safetensors", folder / "back", verify=True)
    assert {one.checked for one in done.tensors} == {"checksum"}
    found: dict[str, Any] = gpuckpt.load(folder / "back", like="numpy")
    found.pop("trainer_0", None)
    return found


@pytest.mark.parametrize("name", TARGETS)
def test_tied_tensors_come_back(name, tmp_path):
    w = np.random.default_rng(0).random((40, 30), np.float32)
    found = through(name, {"emb": w, "other": w[:3] + 1, "head": w}, tmp_path)
    assert same(dict(sorted(found.items())), {"emb": w, "head": w, "other": w[:3] + 1})
    assert (found["emb"] is found["head"]) == (name in KEEP_TIES)


FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")


@pytest.mark.parametrize("name", TARGETS)
def test_float8_tensors_come_back_with_every_bit_or_are_refused_by_name(name, tmp_path):
    bits = np.arange(256, dtype=np.uint8).reshape(16, 16)
    state: dict[str, Any] = {f"w_{one}": bits.view(getattr(ml_dtypes, one)) for one in FLOAT8}
    state["plain"] = np.ones(3, np.float32)
    if name in ("singa", "fluid"):
        words = {"singa": "float32 alone, and this is float8", "fluid": "no type for float8"}
        with pytest.raises(UnsupportedError, match=rf"w_float8_e4m3fn: .*{words[name]}"):
            through(name, state, tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
        return
    assert same(dict(sorted(through(name, state, tmp_path).items())), dict(sorted(state.items())))
