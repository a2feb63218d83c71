"""Processes of their own, to be killed: one holds a lock, one saves for ever."""

from __future__ import annotations

import select
import subprocess
import sys
import time
from typing import Any, Self

import numpy as np
import numpy.typing as npt

import gpuckpt
from gpuckpt.errors import StorageError
from gpuckpt.stores.local import LocalStore

PATIENCE_SECONDS = 60.0
ELEMENTS = 1 << 18


class Child:
    """A process of this module; killed on leaving."""

    def __init__(self, role: str, root: str) -> None:
        """`role` is `hold` or `save`; it works on `root`."""
        command = [sys.executable, "-m", "gpuckpt.selftest.child", role, root]
        self._process = subprocess.Popen(  # noqa: S603 - this very Python
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def hear(self) -> str:
        """Its next line; waits for it.

        Raises:
            StorageError: it ended, or said nothing for a minute.
        """
        assert self._process.stdout is not None
        heard, _, _ = select.select([self._process.stdout], [], [], PATIENCE_SECONDS)
        line = self._process.stdout.readline() if heard else ""
        if not line:
            raise StorageError("a process of the self-test ended, or says nothing; see above why")
        return line.strip()

    def kill(self) -> str:
        """SIGKILL; what it had still said.  Safe to call twice."""
        if self._process.returncode is not None:
            return ""
        self._process.kill()
        rest, _ = self._process.communicate()
        return rest


def state_at(step: int) -> dict[str, npt.NDArray[Any]]:
    """A state that is another one at each step."""
    rng = np.random.default_rng(step)
    return {
        "weights": rng.standard_normal(ELEMENTS, np.float32),
        "counts": rng.integers(0, 9, 100),
    }


def hold(root: str) -> None:
    """Take the root's lock, say so, and keep it."""
    with LocalStore(root).lock():
        say("held")
        time.sleep(PATIENCE_SECONDS)


def save(root: str) -> None:
    """Save step after step, and say which are committed."""
    with gpuckpt.Checkpointer(root, keep=gpuckpt.Keep(last=2)) as ckpt:
        newest = ckpt.latest()
        step = 0 if newest is None else newest.step
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            step += 1
            ckpt.save(step, state_at(step)).result()
            say(str(step))


def say(text: str) -> None:
    """One line to the parent."""
    print(text, flush=True)  # noqa: T201 - how it is heard


if __name__ == "__main__":
    {"hold": hold, "save": save}[sys.argv[1]](sys.argv[2])
