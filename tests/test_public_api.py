"""The public names, their documentation, and the README's code."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gpuckpt

ROOT = Path(__file__).parents[1]
PROMISED = [
    *("save", "load", "Checkpointer", "Pending", "Checkpoint", "Every", "Keep"),
    *("warm_start", "Report", "RNG", "CheckpointError", "Sharded", "PerRank"),
]


def test_the_promised_names_are_there_and_the_list_of_names_is_sorted_and_complete():
    assert set(PROMISED) <= set(gpuckpt.__all__)
    public = {
        name
        for name, value in vars(gpuckpt).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(gpuckpt.__all__) - {"__version__"}


@pytest.mark.parametrize("name", sorted(set(gpuckpt.__all__) - {"__version__"}))
def test_every_public_name_and_method_is_documented(name):
    value = getattr(gpuckpt, name)
    assert inspect.getdoc(value)
    if inspect.isclass(value):
        for method, function in vars(value).items():
            if inspect.isfunction(function) and not method.startswith("_"):
                assert inspect.getdoc(function), f"{name}.{method}"


def test_every_error_is_a_checkpoint_error_drawn_in_the_tree():
    tree = inspect.getdoc(sys.modules["gpuckpt.errors"]) or ""
    for name in gpuckpt.__all__:
        if name.endswith("Error"):
            assert issubclass(getattr(gpuckpt, name), gpuckpt.CheckpointError)
            assert name in tree


def test_importing_it_imports_no_framework():
    program = (
        "import gpuckpt, sys; "
        "print([m for m in ('torch', 'jax', 'cupy', 'tensorflow') if m in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert finished.stdout.strip() == b"[]"


def test_the_readmes_code_runs_from_top_to_bottom(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    # PyTorch's loop runs where torch is: tests/frameworks/test_readme.py.
    blocks = [block for block in blocks if "gpuckpt.torch" not in block]
    assert blocks
    program = tmp_path / "readme.py"
    program.write_text("\n".join(blocks))
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    finished = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert finished.returncode == 0, finished.stderr
