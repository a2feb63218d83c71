"""Programs of several processes, each of which tries the same checks and says what came of them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]


def tell(checks: Mapping[str, Callable[[], object]], where: str) -> None:
    """Make all checks, in their order, and write down how each ended: nothing, or a traceback."""
    found = {}
    for name, check in checks.items():
        try:
            check()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    Path(where).write_text(json.dumps(found))


def run(
    module: str, size: int, *, seconds: float = 240, **environment: str
) -> list[dict[str, str]]:
    """What `size` processes of a module tell; each is started as `module folder rank size`."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
        running = []
        for rank in range(size):
            command = [sys.executable, "-m", module, folder, str(rank), str(size)]
            own = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
            process = subprocess.Popen(
                command, cwd=ROOT, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            ends.callback(_end, process)
            running.append(process)
        said = [process.communicate(timeout=seconds)[0].decode() for process in running]
        for process, text in zip(running, said, strict=True):
            assert process.returncode == 0, text
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(size)]


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.communicate()
