"""examples/dcp_fsdp2.py: two processes killed and resumed, and resumed by three."""

from __future__ import annotations

import pytest

from tests.examples.drive import check_kill_and_resume, run

pytest.importorskip("torch", reason="torch isn't installed")


def test_shards_of_two_processes_go_on_bit_for_bit_and_are_taken_up_by_three(wheel, tmp_path):
    digest = check_kill_and_resume("dcp_fsdp2", wheel, tmp_path, steps=30, kills=(13,))

    root, three = tmp_path / "killed", ("--ranks", "3")
    loaded = run("dcp_fsdp2", wheel, root, steps=30, arguments=three)
    assert loaded.steps == []
    assert loaded.digest == digest, loaded.output
