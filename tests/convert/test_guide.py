"""The guide's code and commands run as they stand there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpuckpt

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "convert.md"


def test_the_guides_code_runs_from_top_to_bottom_and_prints_what_it_says(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    exec("\n".join(blocks), {})

    said = [line.partition("# ")[2] for line in "".join(blocks).splitlines() if "print" in line]
    printed = capsys.readouterr().out
    for line in said[1:]:
        assert line in printed


def test_the_guides_commands_run(tmp_path):
    pytest.importorskip("torch", reason="torch isn't installed")
    state = {"model": {"w": np.ones(3)}}
    for step in (700, 800):
        gpuckpt.save(tmp_path / "runs/a", state, step)
    gpuckpt.convert(tmp_path / "runs/a", tmp_path / "old.pt")
    commands = re.findall(
        r"^    gpuckpt (convert .*?)(?:  +#.*)?$", GUIDE.read_text(), re.MULTILINE
    )
    assert len(commands) == 5
    for command in commands:
        words = shlex.split(command)
        if "700" in words:
            (tmp_path / "model.safetensors").unlink()
        finished = subprocess.run(
            [sys.executable, "-m", "gpuckpt", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, (command, finished.stderr)
    assert list(gpuckpt.load(tmp_path / "runs/b")) == ["model.w"]
