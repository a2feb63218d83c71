"""`python -m bench.disturbance`: what a training loop and a save beside it take from each other.

Each loop runs in a process of its own.  In every round each setting has its
turn: a save alone, the loop alone, the loop beside a save.  A setting is a
switch interval of the interpreter in ms while a save goes on, a niceness of the
save's threads or a scheduling policy (0 is what gpuckpt uses, `batch` and
`idle` are Linux's), and a number of workers with, perhaps, a codec; or
`governed`, where gpuckpt chooses these two by the cores that the loop leaves.
`lost_s` is the time of the window from the save's start to its commit, less
its steps' time at the pace of the loop alone, before and after it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import gpuckpt
from bench.cases import state_of
from bench.machine import machine
from bench.timing import show, spreads, write_report
from gpuckpt import background, switching
from gpuckpt.effort import Effort
from gpuckpt.governor import Governor

MIB = 1 << 20
QUIET_SECONDS = 0.3  # before, and after
# Each with the threads that numpy's matrix products use.
LOOPS = {"gil": 1, "matmul-1": 1, "matmul-2": 2}
SETTINGS = (
    *("0.1/0/2/auto", "0.1/0/1/auto", "0.1/0/2/raw", "0.1/0/1/raw", "0.1/0/governed"),
    *("5/0/2/auto", "0.1/19/2/auto", "0.1/batch/2/auto", "0.1/idle/2/auto"),
)
POLICIES = {"batch": os.SCHED_BATCH, "idle": os.SCHED_IDLE}

Step = Callable[[], object]


def main() -> int:
    """Run each loop in a process of its own, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--directory", type=Path, help="a directory on the disk to measure")
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), help="ms/priority/workers")
    parser.add_argument("--mib", type=int, default=256, help="the state's size")
    parser.add_argument("--codec", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(list(_measure(options))))
        return 0
    results = [row for loop in options.loops for row in _in_child(loop)]
    for row in results:
        show(row)
    if options.out:
        where = machine(options.directory or Path(tempfile.gettempdir()))
        write_report(options.out, {"machine": where, "results": results})
    return 0


def _in_child(loop: str) -> list[dict[str, Any]]:
    """The rows of one loop."""
    threads = str(LOOPS[loop])
    done = subprocess.run(
        [sys.executable, "-m", "bench.disturbance", *sys.argv[1:], "--child", "--loops", loop],
        stdout=subprocess.PIPE,
        check=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads},
    )
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def _measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each setting, whose turns come round by round."""
    (loop,) = options.loops
    rounds: dict[str, list[dict[str, float]]] = {setting: [] for setting in options.settings}
    state, step = state_of(options.mib * MIB, 20), step_of(loop)
    with (
        tempfile.TemporaryDirectory(dir=options.directory) as name,
        gpuckpt.Checkpointer(
            name,
            keep=gpuckpt.Keep(last=1),
            snapshot="copy",
            memory=(options.mib + 256) * MIB,
            codec=options.codec,
        ) as ckpt,
    ):
        for _ in range(options.rounds + 1):
            for setting, rows in rounds.items():
                with _as_set(ckpt, setting):
                    rows.append(one_round(ckpt, state, step))
    for setting, rows in rounds.items():
        yield {
            "case": f"beside-{loop}",
            "setting": setting,
            "state_nbytes": options.mib * MIB,
            "codec": options.codec,
            **spreads(rows[1:]),
        }


@contextlib.contextmanager
def _as_set(ckpt: gpuckpt.Checkpointer, setting: str) -> Iterator[None]:
    """Let saves run as a setting says."""
    milliseconds, priority, workers, *codec = setting.split("/")
    governor, codec = ckpt._governor, codec or [ckpt._options.codec]

    @contextlib.contextmanager
    def beside() -> Iterator[None]:
        """The save's thread is in here; those that it starts are as nice as it is."""
        if priority in POLICIES:
            os.sched_setscheduler(0, POLICIES[priority], os.sched_param(0))
        else:
            os.setpriority(os.PRIO_PROCESS, 0, int(priority))
        with switching.switching_often():
            yield

    def begin() -> None:
        """Choose what the setting says."""
        Governor.begin(governor)
        if workers != "governed":
            governor.effort = Effort(int(workers), *codec)

    with (
        mock.patch.object(governor, "begin", begin),
        mock.patch.object(switching, "SWITCH_SECONDS", float(milliseconds) / 1000),
        mock.patch.object(background, "switching_often", beside),
    ):
        yield


def step_of(loop: str) -> Step:
    """One step of a training loop, some milliseconds long."""
    if loop == "gil":
        small = np.ones(8, np.float32)

        def eager() -> None:
            """Much Python, and array operations too small to let go of the GIL."""
            for _ in range(4000):
                np.add(small, small)

        return eager
    one = np.ones((512, 512), np.float32)
    product = np.empty_like(one)
    return lambda: np.matmul(one, one, out=product)


def one_round(ckpt: gpuckpt.Checkpointer, state: dict[str, Any], step: Step) -> dict[str, float]:
    """A save alone, the loop alone, and both."""
    governor = ckpt._governor
    known = governor._cores._left
    alone = _save(ckpt, state)
    alone.result()
    ckpt.wait()
    # A run's saves are all beside its loop, and come less often.
    governor._cores._left, governor._pressed = known, False
    quiet = list(_steps(step))
    beside = _save(ckpt, state)
    begun, steps, longest = time.perf_counter(), 0, 0.0
    while not beside.committed.is_set():
        before = time.perf_counter()
        step()
        steps += 1
        longest = max(longest, time.perf_counter() - before)
    window = time.perf_counter() - begun
    beside.result()
    pace = statistics.median([*quiet, *_steps(step)])
    seconds, usual = beside.stats.background_seconds, alone.stats.background_seconds
    return {
        "save_alone_s": usual,
        "save_beside_s": seconds,
        "save_beside_cpu_s": beside.stats.cpu_seconds,
        "written_share": beside.stats.written_nbytes / beside.stats.raw_nbytes,
        "beside_over_alone": seconds / usual,
        "lost_s": window - steps * pace,
        "lost_share": 1 - steps * pace / window,
        "longest_step_over_usual": longest / pace,
    }


def _save(ckpt: gpuckpt.Checkpointer, state: dict[str, Any]) -> gpuckpt.Pending:
    with ckpt.update():
        for array in state.values():  # so that every chunk is written
            np.negative(array, out=array)
    return ckpt.save(max(ckpt.steps(), default=0) + 1, state)


def _steps(step: Step) -> Iterator[float]:
    """Seconds of steps that nothing disturbs."""
    end = time.perf_counter() + QUIET_SECONDS
    while (begun := time.perf_counter()) < end:
        step()
        yield time.perf_counter() - begun


if __name__ == "__main__":
    sys.exit(main())
