"""examples/torch_ddp.py: both processes killed, and both resumed."""

from __future__ import annotations

import pytest

from tests.examples.drive import check_kill_and_resume

pytest.importorskip("torch")


def test_two_processes_end_with_the_same_bits_after_a_kill(wheel, tmp_path):
    check_kill_and_resume("torch_ddp", wheel, tmp_path, steps=30, kills=(13,), timeout=240)
