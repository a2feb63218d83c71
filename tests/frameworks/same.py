"""Whether two states are the same, bit for bit; and torch's tensors as bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def bits(tensor: Any) -> bytes:
    # Not `contiguous`: a view with one element is, whatever its stride.
    dense = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
    return dense.view(torch.uint8).numpy().tobytes() if dense.numel() else b""


def frozen(state: Any) -> Any:
    """A state as it is at this moment: copies, which can be compared by `==`."""
    if callable(getattr(state, "state_dict", None)):
        return frozen(state.state_dict())
    if isinstance(state, torch.Tensor):
        return (str(state.dtype), tuple(state.shape), state.stride(), bits(state))
    if isinstance(state, np.ndarray):
        return (str(state.dtype), state.shape, state.tobytes())
    if isinstance(state, Mapping):
        return {key: frozen(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state).__name__, [frozen(value) for value in state]
    return (type(state).__name__, state)
