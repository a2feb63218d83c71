"""Lightning on several ranks: one root, one checkpoint, and each goes on where it was."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gpuckpt

pytest.importorskip("lightning", reason="lightning isn't installed")

REPOSITORY = Path(__file__).parents[2]


def fit(root: Path, stop: int = 0) -> tuple[int, set[tuple[str, str]]]:
    """The exit status, and what the ranks print at their ends."""
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "SLURM_", "OMPI_", "PMI")
    left = {key: value for key, value in os.environ.items() if not key.startswith(launched)}
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.frameworks.ddp_fit", str(root), str(stop)],
        env=left | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=root.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, set(re.findall(r"digest (\d) ([0-9a-f]{64})", done.stdout))


@pytest.mark.slow
def test_two_ranks_that_are_ended_go_on_with_the_same_bits(tmp_path):
    status, whole = fit(tmp_path / "whole")
    assert (status, len(whole)) == (0, 2)
    assert fit(tmp_path / "ended", 8) == (3, set())

    assert fit(tmp_path / "ended") == (0, whole)
    with gpuckpt.Checkpointer(tmp_path / "ended") as saver:
        assert saver.steps() == [11, 12]
