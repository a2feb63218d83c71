"""examples/numba_loop.py, killed in the middle."""

from __future__ import annotations

import pytest

from tests.examples.drive import check_kill_and_resume

pytest.importorskip("numba", reason="numba isn't installed")


def test_arrays_that_compiled_loops_change_end_with_the_same_bits(wheel, tmp_path):
    check_kill_and_resume("numba_loop", wheel, tmp_path, steps=60, kills=(12,))
