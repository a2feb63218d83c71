"""The guides' code and commands run as they stand there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpuckpt
from gpuckpt.conversion import convert
from tests.convert.test_dcp import GOLDEN

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
pytestmark = pytest.mark.filterwarnings("ignore")


def run_commands(guide: Path, folder: Path) -> int:
    commands = re.findall(
        r"^    gpuckpt (convert .*?)(?:  +#.*)?$", guide.read_text(), re.MULTILINE
    )
    for command in commands:
        finished = subprocess.run(
            [sys.executable, "-m", "gpuckpt", *shlex.split(command)],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, (command, finished.stderr)
    return len(commands)


def run_code(guide: Path, capsys) -> None:
    """Run a guide's blocks of code as one, and see that it prints what its comments say."""
    code = "".join(re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL))
    exec(code, {})
    printed = capsys.readouterr().out
    for line in code.splitlines():
        if "print" in line:
            assert line.partition("# ")[2] in printed


def test_the_guide_from_singa_and_fluid(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for step in (400, 700):
        state = {"ip1_weight": np.ones((4, 3), "f4"), "ip1_bias": np.ones(4, "f4")}
        gpuckpt.save("made", state, step=step)
    for step in (400, 700):
        convert("made", f"s{step}", to="singa", step=step)
        (tmp_path / "WORKSPACE/checkpoint").mkdir(parents=True, exist_ok=True)
        name = f"step{step}-worker0.bin"
        (tmp_path / f"s{step}" / name).rename(tmp_path / "WORKSPACE/checkpoint" / name)
    convert("made", "checkpoint_dir", to="fluid")
    assert run_commands(GUIDES / "from-singa-and-fluid.md", tmp_path) == 7
    run_code(GUIDES / "from-singa-and-fluid.md", capsys)
    assert gpuckpt.load("runs/fluid")["trainer_0"] == {"epoch_id": 0, "step_id": 700}


def test_the_guide_from_dcp_and_orbax(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch", reason="needs torch")
    ocp = pytest.importorskip("orbax.checkpoint", reason="needs orbax-checkpoint")
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    Path("checkpoints/step-300").symlink_to(GOLDEN)
    with ocp.CheckpointManager(tmp_path / "orbax-run") as manager:
        manager.save(7, args=ocp.args.StandardSave({"w": np.ones(2)}))
        manager.wait_until_finished()
    assert run_commands(GUIDES / "from-dcp-and-orbax.md", tmp_path) == 4
    run_code(GUIDES / "from-dcp-and-orbax.md", capsys)
