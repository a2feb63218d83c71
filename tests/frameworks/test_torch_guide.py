"""docs/guides/torch.md: its code runs, and its way into a loop is as short as it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

REPOSITORY = Path(__file__).parents[2]
GUIDE = (REPOSITORY / "docs/guides/torch.md").read_text()
AROUND = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import gpuckpt
device, Model, loss_of = "cpu", lambda: nn.Linear(4, 2), nn.functional.cross_entropy
dataset = TensorDataset(torch.randn(70, 4), torch.randint(0, 2, (70,)))
"""


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def run(program, directory):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=directory,
        env={"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_code_runs_from_top_to_bottom(tmp_path):
    run("\n".join(blocks("python")), tmp_path)


def test_a_loop_gets_checkpoints_by_less_than_ten_lines(tmp_path):
    (diff,) = blocks("diff")
    added = [line for line in diff.splitlines() if line.startswith("+") and line != "+"]
    assert len(added) < 10
    assert "Seven lines" in GUIDE
    assert len(added) == 7

    after = "".join(f"{line[1:]}\n" for line in diff.splitlines() if not line.startswith("-"))
    # Again: all epochs are over.
    told = "print(run.done)\n"
    assert run(2 * f"{AROUND}{after}{told}", tmp_path).split() == ["30", "30"]
