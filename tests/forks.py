"""Ranks of torch, forked from one process that has imported it: once for all tests of a process.

To import it takes seconds of a core, and a test starts up to four times several ranks.  What the
ranks themselves import, above all the code that is tested, is imported after the fork.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import select
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).parents[1]
# What torch's ranks import; optimizers import the last.
IMPORTED = (
    *("torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp"),
    *("torch.distributed.tensor.parallel", "torch._dynamo"),
)


class Forked:
    """A process that was forked from another's, with as much of `subprocess.Popen` as is needed."""

    def __init__(self, pid: int, answers: IO[bytes]) -> None:
        self.pid, self._answers = pid, answers
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status; raises `subprocess.TimeoutExpired`."""
        if self.returncode is None:
            if not select.select([self._answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = int(self._answers.readline())
        return self.returncode


def fork(directory: Path, environment: Mapping[str, str]) -> Forked:
    """Begin the task of a directory (see `tests/launch.py`) in a process group of its own."""
    parent = _parent()
    if parent.poll() is not None:  # somebody has ended it
        _parent.cache_clear()
        parent = _parent()
    assert parent.stdin is not None
    assert parent.stdout is not None
    request = {"directory": str(directory), "environment": dict(environment)}
    parent.stdin.write(json.dumps(request).encode() + b"\n")
    answer = parent.stdout.readline()
    assert answer, f"the process that imports torch has ended with {parent.wait()}"
    return Forked(int(answer), parent.stdout)


@functools.cache
def _parent() -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forks"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,  # what is there can be selected
        start_new_session=True,
    )
    atexit.register(process.communicate)  # it ends when nobody asks any more
    return process


def serve(work: Callable[[Path], None]) -> None:
    """Fork for each line that comes, say which process it is, and then how it ended."""
    for name in IMPORTED:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            answers.close()
            _live(work, Path(request["directory"]), request["environment"])
        _lead_a_group(child)
        answers.write(b"%d\n" % child)
        answers.write(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _live(work: Callable[[Path], None], directory: Path, environment: dict[str, str]) -> None:
    """Do it, and end the process."""
    _lead_a_group(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(directory / "output-0", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for source, place in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, place)
    os.environ.clear()
    os.environ.update(environment)
    try:
        work(directory)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _lead_a_group(pid: int) -> None:
    """Both the child and its parent see to it, so that it is so whoever comes first."""
    os.setpgid(pid, pid)


if __name__ == "__main__":
    from tests.launch import fork_ranks

    serve(fork_ranks)
