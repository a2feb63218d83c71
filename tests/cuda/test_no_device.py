"""CuPy is there, and no GPU answers it."""

from __future__ import annotations

import numpy as np

import gpuckpt
from tests.test_without_gpu import LOAD, run


def test_cupy_without_a_gpu_is_told_apart_from_no_cupy(tmp_path):
    gpuckpt.save(tmp_path, {"w": np.ones(3)})
    message = run(LOAD, tmp_path)
    assert "cuda:0" in message
    assert "CUDA device" in message
