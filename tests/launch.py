"""Real processes as ranks: start N of them, and get what each made of it.

    found = launch("torch", "tests.ranks.workers:gathers", 4, tmp_path, {"rounds": 3})
    assert [one.value for one in found] == …

`kind` says how they are started, and where they meet:

| kind | processes | meet |
|---|---|---|
| `torch` | forked from one that has imported torch (`tests/forks.py`); gloo | in its TCPStore |
| `jax` | plain, jax.distributed initialised on the CPU | in its coordination service |
| `mpi` | by `mpirun` | in a communicator |
| `store` | plain | by records in the directory `tmp_path/root` |

A worker is a function of a module: `work(group, arguments)`.  It is called in
each process with its `gpuckpt.Group`, as `as_group(None, …)` finds it, and with
`arguments` (anything that JSON can say) plus `arguments["directory"]`; what it
returns goes back as JSON.  An exception's text is in `Rank.error`.

Processes end in any case: after `timeout` seconds each ends itself, with every
thread's stack in its output; and when `launch` is left, all are killed that are
still there.  `tests/ranks/conftest.py` skips where a kind's packages aren't.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from tests.forks import Forked, fork

REPOSITORY = Path(__file__).parents[1]
KINDS = ("torch", "mpi", "jax", "store")
PACKAGES = {"torch": ("torch",), "mpi": ("mpi4py",), "jax": ("jax",), "store": ()}
_DIE_WITH_PARENT = 1
# Ranks of this run alone: not of a launcher that runs the tests.
_LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_", "SLURM_", "OMPI_", "PMI", "PMIX_", "PRTE_")

Process: TypeAlias = Forked | subprocess.Popen[bytes]


@dataclass(frozen=True)
class Rank:
    """What became of one process: `value` is what its worker returned, else `error` says why not.

    `code` is its exit status (of `mpirun`, with `mpi`); -9 if it was killed.
    """

    code: int | None
    value: Any
    error: str | None
    output: str


def launch(
    kind: str,
    worker: str,
    size: int,
    directory: Path,
    arguments: Mapping[str, Any] | None = None,
    *,
    timeout: float = 60.0,
) -> list[Rank]:
    """Start `size` ranks, wait for their ends, and say what became of each, by rank."""
    directory.mkdir(parents=True, exist_ok=True)
    given = dict(arguments or {}) | {"directory": str(directory)}
    task = {"kind": kind, "worker": worker, "size": size, "timeout": timeout, "port": free_port()}
    (directory / "task.json").write_text(json.dumps(task | {"arguments": given}))
    with _processes(kind, size, directory) as processes:
        end = time.monotonic() + timeout + 10
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(end - time.monotonic(), 0))
    codes = [process.returncode for process in processes]
    if (directory / "codes.json").exists():
        codes = json.loads((directory / "codes.json").read_text())
    return [_found(directory, rank, codes[rank % len(codes)]) for rank in range(size)]


def free_port() -> int:
    """A port of loopback that nobody has at this moment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def mpirun() -> str | None:
    """The launcher of MPI: that beside this Python, else the system's."""
    beside = Path(sys.executable).parent / "mpirun"
    places = (str(beside), *(f"{one}/mpirun" for one in os.get_exec_path()))
    return next((one for one in places if os.access(one, os.X_OK)), None)


@contextlib.contextmanager
def _processes(kind: str, size: int, directory: Path) -> Iterator[list[Process]]:
    command = [sys.executable, "-m", "tests.launch", str(directory)]
    left = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHERS)}
    left |= {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    commands = [[*command, str(rank)] for rank in range(size)]
    if kind == "mpi":
        options = ["--oversubscribe", "--allow-run-as-root", "--enable-recovery", "-n", str(size)]
        commands = [[str(mpirun()), *options, *command]]
    processes: list[Process] = []
    try:
        if kind == "torch":
            processes.append(fork(directory, left))
            commands = []
        for rank, one in enumerate(commands):
            with (directory / f"output-{rank}").open("wb") as output:
                processes.append(
                    subprocess.Popen(
                        one,
                        cwd=REPOSITORY,
                        env=left | {"RANK": str(rank), "WORLD_SIZE": str(size)}
                        if kind == "store"
                        else left,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _found(directory: Path, rank: int, code: int | None) -> Rank:
    outputs = [directory / f"output-{one}" for one in (rank, 0)]
    output = next(one for one in outputs if one.exists()).read_text(errors="replace")
    place = directory / f"result-{rank}.json"
    if not place.exists():
        return Rank(code, None, "it ended without a result", output)
    result = json.loads(place.read_text())
    return Rank(code, result.get("value"), result.get("error"), output)


def main(directory: Path, rank: int) -> None:
    """One rank: `rank` is -1 where a launcher knows it."""
    task = json.loads((directory / "task.json").read_text())
    faulthandler.dump_traceback_later(task["timeout"], exit=True)
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    result: dict[str, Any]
    try:
        _begin(task["kind"], rank, task["size"], directory, task["port"])
        group = _group(directory)
        rank = group.rank
        module, _, name = task["worker"].partition(":")
        work = getattr(importlib.import_module(module), name)
        result = {"value": work(group, task["arguments"])}
        getattr(group, "close", lambda: None)()
    except BaseException as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    temporary = directory / f"result-{rank}.tmp"
    temporary.write_text(json.dumps(result))
    temporary.rename(directory / f"result-{rank}.json")
    # Neither framework leaves in good order if a rank was killed.
    sys.stdout.flush()
    os._exit(0 if "value" in result else 1)


def fork_ranks(directory: Path) -> None:
    """Import what the ranks need once, and be the parent of them all."""
    task = json.loads((directory / "task.json").read_text())
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    module = importlib.import_module(task["worker"].partition(":")[0])
    for name in ("torch.distributed", *getattr(module, "BEFORE_FORKS", ())):
        importlib.import_module(name)
    children = []
    for rank in range(task["size"]):
        child = os.fork()
        if child == 0:
            output = os.open(directory / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            main(directory, rank)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    (directory / "codes.json").write_text(json.dumps(codes))


def _group(directory: Path) -> Any:
    from gpuckpt.groups.detect import as_group
    from gpuckpt.stores.local import LocalStore

    store = LocalStore(directory / "root")
    return as_group(None, store=store, environment=os.environ, modules=sys.modules)


def _begin(kind: str, rank: int, size: int, directory: Path, port: int) -> None:
    """Do what a program of that kind does at its beginning."""
    if kind == "torch":
        from torch import distributed

        store = distributed.TCPStore("127.0.0.1", port, size, rank == 0)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    elif kind == "jax":
        import jax

        jax.distributed.initialize(f"127.0.0.1:{port}", size, rank)
    elif kind == "mpi":
        from mpi4py import MPI  # noqa: F401


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else -1)
