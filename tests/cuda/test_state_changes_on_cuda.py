"""States in a GPU's memory that change between saves: each checkpoint is the state at its save."""

from __future__ import annotations

import gc
import sys
import types
from pathlib import Path
from typing import Any

import cupy as cp
import numpy as np
from hypothesis import HealthCheck, Phase, settings

from tests import test_state_changes as on_host
from tests.changing_states import Box
from tests.strategies import Array


class Changes(on_host.Changes):
    """The same, with arrays of the GPU among the others."""

    def new(self) -> Any:
        return self.on_gpu() if self.rng.random() < 0.7 else super().new()

    def on_gpu(self) -> Any:
        shape = self.rng.choice(((), (0,), (7,), (40, 5), (20_000,), (40_000,)))
        whole = cp.asarray(self.numbers(shape, self.rng.choice(("f4", "f2", "i4", "u1"))))
        if len(shape) < 2:
            return whole
        return self.rng.choice((whole, whole.T, whole[::-1], whole[:, ::3], whole[..., 0]))

    def change(self, seed: int) -> None:
        super().change(seed)
        container, key = self.place()
        if isinstance(leaf := container[key], cp.ndarray):
            ways = (self.refill, self.freed_and_taken_again, self.moved, self.viewed)
            container[key] = self.rng.choice(ways)(leaf)

    def refill(self, leaf: Any) -> Any:
        leaf[...] = cp.asarray(self.numbers(leaf.shape, leaf.dtype.str))
        return leaf

    def freed_and_taken_again(self, leaf: Any) -> Any:
        """The pool gives the same memory to the next who asks for as much."""
        shape, dtype = leaf.shape, leaf.dtype
        made = self.numbers(shape, dtype.str)
        del leaf
        gc.collect()
        return cp.asarray(made)

    def moved(self, leaf: Any) -> Any:
        return leaf.get() if self.rng.random() < 0.3 else leaf.copy()

    def viewed(self, leaf: Any) -> Any:
        return leaf.reshape(-1)[::2] if leaf.ndim else leaf


def brought(node: Any) -> Any:
    """What of a state lies on the GPU, on the host, and all of it its own."""
    if isinstance(node, dict):
        return {key: brought(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(brought(value) for value in node)
    if isinstance(node, Box):
        return brought(node.items)
    return node.get() if isinstance(node, cp.ndarray) else on_host.taken(node)


class HistoryOnGPU(on_host.History):
    """The same with such a state; a restore goes to the host."""

    def begin(self, folder: Path) -> Changes:
        torch: Any = sys.modules["torch"]
        torch.cuda = types.SimpleNamespace(is_initialized=lambda: False)
        return Changes(folder)

    def taken(self, state: Any) -> Any:
        return brought(state)


def test_numbers_of_the_gpu_are_told_apart():
    state = {"a": cp.arange(3), "b": [np.ones(2)]}
    found: dict[str, Array] = brought(state)
    assert isinstance(found["a"], np.ndarray)


TestHistoryOnGPU = HistoryOnGPU.TestCase
TestHistoryOnGPU.settings = settings(
    max_examples=10,
    stateful_step_count=15,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
