"""examples/cupy_loop.py: over a stand-in for CUDA's driver, or on a GPU (`make test-gpu`)."""

from __future__ import annotations

import os

import pytest

from tests.cuda_on_cpu import standin
from tests.examples.drive import check_kill_and_resume


@pytest.fixture
def launcher(monkeypatch) -> tuple[str, ...]:
    """What the example is started by; nothing on a GPU."""
    settings = os.environ.get(standin.VARIABLE, "mode=lazy,mem_mb=512")
    if not settings:
        cupy = pytest.importorskip("cupy", reason="CuPy isn't installed")
        return () if cupy.is_available() else pytest.skip("no CUDA device")
    if reason := standin.available():
        pytest.skip(reason)
    monkeypatch.setenv(standin.VARIABLE, settings)
    return ("-m", standin.__name__)


def test_the_loop_ends_with_the_same_bits_after_a_kill(wheel, tmp_path, launcher):
    check_kill_and_resume("cupy_loop", wheel, tmp_path, steps=40, kills=(13,), launcher=launcher)
