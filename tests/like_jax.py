"""An array as JAX has them on the host, without JAX: others may look at it, and none may write."""

from __future__ import annotations

from typing import Any

import numpy as np


class Array:
    """Its memory is a numpy array's, which only a test changes."""

    __module__ = "jax.double"

    def __init__(self, memory: np.ndarray[Any, Any]) -> None:
        self.memory = memory
        self.deleted = False
        self.dtype, self.shape = memory.dtype, memory.shape

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self) -> Any:
        return self.memory.__dlpack__()

    def is_deleted(self) -> bool:
        return self.deleted
