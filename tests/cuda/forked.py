"""Scenarios with a mutant, in processes forked from one that has imported CuPy on the stand-in.

To import it takes longer than most scenarios. The engine, of which a mutant changes a module, is
imported after the fork. A process serves one of the stand-in's settings, which are fixed once its
library is loaded.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import subprocess
import sys
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import IO, Any, Self, cast

from tests.cuda import mutants
from tests.cuda_on_cpu import standin

# What the scenarios import, but for the engine.
IMPORTED = ("cupy", "ml_dtypes", "pytest", "unittest.mock", "xxhash", "zstandard")
WAITING_MAX = 16  # who asks before it has forked for those that asked earlier


class Parent:
    """The process that forks for whoever asks; it ends with the block, or with its own parent."""

    def __init__(self, address: Path, settings: str) -> None:
        self._address = str(address)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cuda.forked", self._address],
            cwd=mutants.PACKAGE.parent,
            env=os.environ | {standin.VARIABLE: settings, "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert cast("IO[bytes]", self._process.stdout).readline(), "it has ended with an error"

    def play(self, scenario: str, mutant: str, timeout: float) -> str:
        """How a mutant fares in a scenario: `right`, `wrong` or `hangs`."""
        with Client(self._address, "AF_UNIX") as child:
            try:
                pid = child.recv()
                child.send((scenario, mutant))
                if child.poll(timeout):
                    return str(child.recv())
            except (EOFError, ConnectionError):
                return "wrong"  # it has crashed
            os.kill(pid, signal.SIGKILL)
            return "hangs"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def serve(address: str) -> None:
    """Fork for each connection, until standard input ends."""
    standin.install_from_environment()
    for name in IMPORTED:
        importlib.import_module(name)
    mutants.find()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    with Listener(address, "AF_UNIX", backlog=WAITING_MAX) as listener:
        print("listening", flush=True)
        listening = cast("Any", listener)._listener._socket
        while sys.stdin not in select.select([sys.stdin, listening], [], [])[0]:
            with listener.accept() as connection:
                if os.fork() == 0:
                    live(connection)


def live(connection: Connection[Any, Any]) -> None:
    """Play what is asked for, say how it went, and end the process: a mutant's threads may hang."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for place in range(3):  # what it says is not for who reads the parent's answer
        os.dup2(nowhere, place)
    try:
        connection.send(os.getpid())
        scenario, mutant = connection.recv()
        connection.send("right" if mutants.play(scenario, mutant) else "wrong")
    finally:
        os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
