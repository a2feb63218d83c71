"""Fingerprints of a whole training state, made without the engine that they judge."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np


def digests(state: dict[str, Any]) -> dict[str, str]:
    """Return a SHA-256 of every tensor, generator and plain value that training depends on."""
    generators = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 (what dropout draws from)
        "batches": state["data"].state_dict(),
    }
    kept = {"model": state["model"], "optimizer": state["optimizer"], "generators": generators}
    return dict(_digests("", kept))


def _digests(path: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [one for key in value for one in _digests(f"{path}/{key}".lstrip("/"), value[key])]
    if not hasattr(value, "dtype"):
        return [(path, hashlib.sha256(repr(value).encode()).hexdigest())]
    array = np.ascontiguousarray(value.get() if hasattr(value, "get") else value)
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(array.tobytes())
    return [(path, digest.hexdigest())]
