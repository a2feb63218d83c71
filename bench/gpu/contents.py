"""Seeded contents of device memory: what weights look like to a coder."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from gpuckpt.dtypes import to_numpy

_DRAWN = 1 << 22


def normal(nbytes: int, dtype: str = "float32", offset: int = 0) -> Any:
    """uint8[nbytes] on the device: normally distributed numbers of `dtype`.

    They begin `offset` bytes after a multiple of 256.  4 Mi of them are drawn,
    and repeated.
    """
    rng = np.random.default_rng(7)
    numbers = rng.standard_normal(min(_DRAWN, nbytes), np.float32)
    if dtype == "uint8":
        numbers = np.clip(numbers * 32 + 128, 0, 255)
    drawn = cupy.asarray(numbers.astype(to_numpy(dtype)).view(np.uint8))
    memory = cupy.empty(nbytes + 256, np.uint8)[offset : offset + nbytes]
    for start in range(0, nbytes, drawn.size):
        part = memory[start : start + drawn.size]
        part[:] = drawn[: part.size]
    return memory


def state_of(nbytes: int, tensors: int) -> dict[str, Any]:
    """A state of float32 tensors on the device, `nbytes` in all but for a rest."""
    count = max(nbytes // tensors // 4, 1)
    whole = normal(4 * count * tensors).view(np.float32)
    return {f"w{at}": whole[at * count : (at + 1) * count].copy() for at in range(tensors)}


def state_nbytes(state: dict[str, Any]) -> int:
    """Of all its tensors."""
    return sum(tensor.nbytes for tensor in state.values())
