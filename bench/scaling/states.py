"""States as training has them, for a coder: seeded, normally distributed, not trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

State = dict[str, npt.NDArray[Any]]

SEED = 7
DEVIATION = 0.02  # a transformer's weights at its beginning
LEARNING_RATE = 2e-5
# Adam's first moment of gradients that are noise, by the root of the second: (1 - b) / (1 + b)
# of the variance is left with b = 0.9.
UPDATE_DEVIATION = (0.1 / 1.9) ** 0.5


def weights(nbytes: int, tensors: int) -> State:
    """Normally distributed float32 of `nbytes` in all, each tensor as long as the others."""
    rng = np.random.default_rng(SEED)
    count = nbytes // tensors // 4
    scale = np.float32(DEVIATION)
    return {f"w{at}": scale * rng.standard_normal(count, np.float32) for at in range(tensors)}


def like(state: State) -> State:
    """Memory of the same shape, whose pages are there."""
    return {name: np.ones_like(array) for name, array in state.items()}


def fine_tuning(nbytes: int, tensors: int) -> Iterator[State]:
    """bfloat16 weights of `nbytes` in all, step after step, in the same arrays.

    Weights in float32 take steps as Adam's are for gradients that are noise,
    and are rounded: normally distributed, 0.23 of `LEARNING_RATE` wide.
    """
    masters = weights(2 * nbytes, tensors)
    state = {name: array.astype(ml_dtypes.bfloat16) for name, array in masters.items()}
    rng = np.random.default_rng(SEED + 1)
    size = np.float32(LEARNING_RATE * UPDATE_DEVIATION)
    steps = size * rng.standard_normal(nbytes // tensors // 2, np.float32)
    while True:
        yield state
        for name, array in masters.items():
            np.add(array, np.roll(steps, int(rng.integers(steps.size))), out=array)
            state[name][...] = array.astype(ml_dtypes.bfloat16)
