"""numba: what its functions compute on are arrays like any other's, also in CUDA's simulator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuckpt
from gpuckpt.stores.memory import MemoryStore

numba = pytest.importorskip("numba", reason="numba isn't installed")

SIMULATED = """
import numpy as np
from numba import cuda
import gpuckpt
from gpuckpt.stores.memory import MemoryStore

@cuda.jit
def add(x, n):
    at = cuda.grid(1)
    if at < x.size:
        x[at] += n

store = MemoryStore()
state = {"w": cuda.to_device(np.arange(100.0)), "strided": cuda.to_device(np.arange(20.0))[::2]}
leaf = state["w"]
add[4, 32](leaf, 1)
gpuckpt.save("", state, store=store)
add[4, 32](leaf, 1)
with gpuckpt.Checkpointer("", store=store) as ckpt:
    ckpt.restore(state)
assert state["w"] is leaf, "filled in place"
assert np.array_equal(leaf.copy_to_host(), np.arange(100.0) + 1)
add[4, 32](state["w"], 1)
assert np.array_equal(leaf.copy_to_host(), np.arange(100.0) + 2)
print("as it was")
"""


@numba.njit
def step(weights, momentum, x):
    for at in range(weights.size):
        momentum[at] = 0.9 * momentum[at] + x[at] - weights[at]
        weights[at] += 0.1 * momentum[at]


def test_arrays_that_compiled_functions_change_go_on_bit_for_bit():
    state: dict[str, Any] = {"weights": np.zeros(64), "momentum": np.zeros(64, np.float32)}
    other = {name: np.ones_like(array) for name, array in state.items()}
    store, x = MemoryStore(), np.linspace(0, 1, 64)
    with gpuckpt.Checkpointer("", store=store) as ckpt:
        for _ in range(3):
            with ckpt.update():
                step(**state, x=x)
        ckpt.save(3, state)
        assert ckpt.resume(other) == 3
    for one in (state, other):
        step(**one, x=x)
    for name, array in state.items():
        assert array.tobytes() == other[name].tobytes()


def test_arrays_of_cudas_simulator_are_filled_in_place(tmp_path):
    pytest.importorskip("numba.cuda", reason="numba-cuda isn't installed")
    script = tmp_path / "simulated.py"
    script.write_text(SIMULATED)
    path = str(Path(gpuckpt.__file__).parents[1])
    told = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert told.stdout == "as it was\n", told.stderr
