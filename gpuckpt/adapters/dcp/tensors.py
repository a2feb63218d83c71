"""torch's tensors, where the engine can reach their memory; else copies on the host."""

from __future__ import annotations

from typing import Any

import torch

from gpuckpt.arrays import Tensor, look
from gpuckpt.errors import UnsupportedError


def is_reached(tensor: Any) -> bool:
    """Whether the engine can read and write its memory where it is: a GPU's by cupy."""
    device = tensor.device.type
    return bool(device == "cpu" or (device == "cuda" and _has_cupy()))


def seen(tensor: Any, name: str) -> Tensor:
    """A tensor's memory where it is, or of a copy on the host, without its history.

    Raises:
        UnsupportedError: its elements don't lie in memory as a dense tensor's.
    """
    if not isinstance(tensor, torch.Tensor):
        raise UnsupportedError(name, f"the planner gave a {type(tensor).__name__} for a tensor")
    plain = tensor.detach().resolve_conj().resolve_neg()
    found = look(plain if is_reached(plain) else plain.cpu(), name)
    assert found is not None
    return found


def _has_cupy() -> bool:
    try:
        import cupy  # noqa: F401
    except ImportError:
        return False
    return True
