"""A training loop's steps, without a model: matrix products, and passes over memory."""

from __future__ import annotations

import time
from typing import Any

import cupy
import numpy as np

_REPEATS_MAX = 1000


class Training:
    """Steps of about the same length on the current stream; they touch no state."""

    def __init__(self, step_seconds: float, side: int) -> None:
        """Find out how often to repeat the work on side² matrices; no products without cuBLAS."""
        self._left = cupy.ones((side, side), np.float32)
        self._right, self._out = cupy.ones_like(self._left), cupy.ones_like(self._left)
        self.products = self._has_products()
        self._repeats = 1
        for _ in range(3):
            self.step()
        cupy.cuda.get_current_stream().synchronize()
        took = min(self.timed() for _ in range(3))
        self._repeats = min(max(round(step_seconds / took), 1), _REPEATS_MAX)

    def step(self) -> None:
        """Give a step's work to the stream; doesn't wait."""
        for _ in range(self._repeats):
            self._once()

    def timed(self) -> float:
        """Seconds of a step, until it has been done."""
        begun = time.perf_counter()
        self.step()
        cupy.cuda.get_current_stream().synchronize()
        return time.perf_counter() - begun

    def _once(self) -> None:
        if self.products:
            cupy.matmul(self._left, self._right, out=self._out)
        cupy.multiply(self._left, np.float32(1.0), out=self._left)

    def _has_products(self) -> bool:
        try:
            cupy.matmul(self._left, self._right, out=self._out)
        except (ImportError, OSError, RuntimeError, AttributeError):
            return False
        return True


def touch(state: dict[str, Any]) -> None:
    """Change a state a little, so that it isn't the one that was saved before."""
    first = next(iter(state.values()))
    first[:1] += 1
