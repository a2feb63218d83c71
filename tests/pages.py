"""Runs what a page of the documentation shows: its blocks of code, in their order.

A block of Python with a title is written to a file of that name; another is a program. A block of
`sh` is a script of bash. All run in one directory, which is empty at first.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FENCE = re.compile(
    r'^( *)```(\w+)(?: title="([^"]+)")?[^\n]*\n(.*?)^\1```', re.MULTILINE | re.DOTALL
)
LIMIT_S = 120


class Block(NamedTuple):
    language: str
    title: str | None
    text: str


def blocks(page: Path) -> list[Block]:
    """The page's blocks of code, without their indentation."""
    found = FENCE.findall(page.read_text())
    return [
        Block(language, title or None, re.sub(f"^{indent}", "", text, flags=re.MULTILINE))
        for indent, language, title, text in found
    ]


def environment(directory: Path, warnings: str = "error") -> dict[str, str]:
    """That of this process, where `python` and `gpuckpt` are this interpreter's."""
    tools = directory / ".tools"
    tools.mkdir(exist_ok=True)
    for name, module in {"python": "", "gpuckpt": "-m gpuckpt "}.items():
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module}"$@"\n')
        (tools / name).chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONWARNINGS": warnings, "PYTHONPATH": str(ROOT)}


def run(shown: list[Block], directory: Path, warnings: str = "error") -> str:
    """What they print; the first that fails is an assertion with its error.

    `warnings` is Python's option `-W`: not all libraries are free of them.
    """
    printed = ""
    for number, block in enumerate(shown):
        if block.language == "python" and block.title:
            (directory / block.title).write_text(block.text)
            continue
        script = directory / f".block-{number}"
        script.write_text(block.text)
        command = [sys.executable] if block.language == "python" else ["bash", "-euo", "pipefail"]
        finished = subprocess.run(
            [*command, str(script)],
            cwd=directory,
            env=environment(directory, warnings),
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_S,
        )
        assert finished.returncode == 0, f"{block.text}\n{finished.stdout}\n{finished.stderr}"
        printed += finished.stdout
    return printed
