"""Gives the examples' tests gpuckpt as a user has it: installed from a wheel."""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SOURCES = ("gpuckpt", "kernels", "hatch_build.py", "pyproject.toml", "README.md")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory, worker_id) -> Path:
    """The directory that gpuckpt's wheel is installed into; all workers of a run share one."""
    base: Path = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    installed = shared / "installed"
    with (shared / "installed.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not installed.exists():
            install(shared, installed)
    return installed


def install(directory: Path, installed: Path) -> None:
    """Build the wheel from a copy: a build compiles into the tree that it is built from."""
    source = directory / "source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in SOURCES:
        one = REPOSITORY / name
        if one.is_dir():
            shutil.copytree(one, source / name, ignore=ignored)
        else:
            shutil.copy2(one, source / name)
    isolated = [] if importlib.util.find_spec("hatchling") is None else ["--no-build-isolation"]
    pip("wheel", "--no-deps", *isolated, "--wheel-dir", str(directory / "wheels"), str(source))
    (built,) = (directory / "wheels").glob("gpuckpt-*.whl")
    unfinished = directory / "installing"
    pip("install", "--no-deps", "--target", str(unfinished), str(built))
    unfinished.rename(installed)


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}: {done.stdout}{done.stderr}")
