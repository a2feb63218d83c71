"""Where a benchmark ran: so that figures are compared only where they can be."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gpuckpt.native import native


def machine(directory: Path) -> dict[str, Any]:
    """The machine, the file system of `directory`, versions, commit, date and command."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "file_system": _command("stat", "-f", "-c", "%T", str(directory)),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "zstandard", "xxhash")},
        "compiled_loops": native() is not None,
        "commit": _command("git", "rev-parse", "--short", "HEAD"),
        "load_before": os.getloadavg()[0],
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _command(*words: str) -> str:
    try:
        finished = subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return finished.stdout.strip()
