"""examples/torch_loop.py, killed in the middle of its second epoch."""

from __future__ import annotations

import pytest

from tests.examples.drive import check_kill_and_resume

pytest.importorskip("torch")


def test_the_loop_ends_with_the_same_bits_after_a_kill(wheel, tmp_path):
    check_kill_and_resume("torch_loop", wheel, tmp_path, steps=36, kills=(27,), timeout=240)
