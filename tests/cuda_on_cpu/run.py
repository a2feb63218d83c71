"""Runs the CUDA tests on the stand-in in each of its modes, each in a process of its own.

No single mode finds every fault of a pipeline: eager finds none of its missing waits, lazy finds
those whose data nobody asked for yet, and only real concurrency, jittered or with slow copies,
finds memory that is given back too early. Where streams share a queue, a wait for a value that only
later work would write hangs.

What looks for missing waits runs in every mode. Of the others, each test runs in one of the three
jittered modes; and tests of bytes, counts and refusals, whatever the moment at which work is done,
run with two devices and in one of three more modes. A test's name says in which: they are the same
in each run. `--whole` has all tests run in every mode.

Run it as ``python -m tests.cuda_on_cpu.run [--only WORD] [--whole] [-- PYTEST_ARGUMENTS]``.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

from tests.cuda_on_cpu import build, standin

MODES = {
    "lazy": "mode=lazy",  # these two first, as they take longest: one has test_mutants.py
    "two devices": "mode=async,devices=2",  # the other all that is timeless
    "eager": "mode=eager",
    "jitter, seed 1": "mode=async,jitter_us=200,seed=1",
    "jitter, seed 2": "mode=async,jitter_us=200,seed=2,order=2",
    "jitter, seed 3": "mode=async,jitter_us=200,seed=3,order=1",
    "slow copies out": "mode=async,d2h_gbps=0.05",
    "two devices, lazy": "mode=lazy,devices=2",
    "little memory": "mode=async,mem_mb=96",
}
# Nothing of theirs depends on the order in which streams do their work but what the scenarios of
# test_missing_waits.py depend on, too: they ask which bytes come back and are written, how many
# calls are made, and what is said when one is refused.
TIMELESS = (
    "test_census_on_cuda.py",
    "test_cuda_errors.py",
    "test_deltas_on_cuda.py",
    "test_derived_on_cuda.py",
    "test_flips_on_cuda.py",
    "test_full_disks_on_cuda.py",
    "test_increments_on_cuda.py",
    "test_launches.py",
    "test_no_device.py",
    "test_resharding_on_cuda.py",
    "test_seal_on_cuda.py",
    "test_state_changes_on_cuda.py",
    "test_unchanged_on_cuda.py",
)
# These run on two devices, and as late as can be, or at once with threads in a random order,
# or without room.
WHOLE = "two devices"
BESIDES = ("lazy", "jitter, seed 2", "little memory")
# These look for missing waits: in every mode.
WAITS = (
    "test_callers_streams.py",
    "test_hold.py",
    "test_missing_waits.py",
    "test_mutants.py",
    "test_others_streams.py",
    "test_planted_faults.py",
    "test_standin.py",
    "test_streams_and_events.py",
)
JITTERED = ("jitter, seed 1", "jitter, seed 2", "jitter, seed 3")
MODE = "GPUCKPT_STANDIN_MODE"  # the name of the mode whose share of the tests is to run
MEMORY = "mem_mb=512"
LIMIT_S = 600
AT_ONCE = 4  # tests of waits wait for most of their time


def runs_in(mode: str, test: str) -> bool:
    """Whether a mode has a test, named as by pytest, in its share."""
    file = test.partition("::")[0].rpartition("/")[2]
    if file in WAITS:
        return True
    chance = zlib.crc32(test.encode()) % 3
    if file in TIMELESS:
        return mode in (WHOLE, BESIDES[chance])
    return mode not in JITTERED or mode == JITTERED[chance]


def run_mode(name: str, settings: str, arguments: list[str], *, share: bool) -> bool:
    """One line, and the tests' whole output where they fail."""
    environment = os.environ | {standin.VARIABLE: f"{MEMORY},{settings}"}
    environment |= {MODE: name} if share else {}
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    start = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=build.HERE.parents[1],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output = process.communicate(timeout=LIMIT_S)[0]
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
            os.killpg(process.pid, signal.SIGKILL)  # and whatever the tests started
            output = f"{process.communicate()[0]}\nstopped: {stop!r}"
    passed = process.returncode == 0
    last = output.strip().rsplit("\n", maxsplit=1)[-1]
    took = time.monotonic() - start
    word = "ok" if passed else "FAILED"
    line = f"{word:6} {name:17} {last.strip('= ')} (in all {took:.1f} s)"
    print(line if passed else f"{output}\n{line}", flush=True)
    return passed


def arguments_of(name: str, *, whole: bool) -> list[str]:
    """The files of tests/cuda that a mode is there for."""
    ignored = () if whole or name in (WHOLE, *BESIDES) else TIMELESS
    return ["tests/cuda", *(f"--ignore=tests/cuda/{file}" for file in ignored)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--only", default="", help="the mode of this name, or those whose name contains it"
    )
    parser.add_argument("--whole", action="store_true", help="every test in every mode")
    parser.add_argument("arguments", nargs="*", help="for pytest, instead of tests/cuda")
    options = parser.parse_args()
    try:
        build.build()
    except build.MissingError as error:
        print(f"cuda-on-cpu: can't be built here: {error}", file=sys.stderr)
        return build.MISSING
    chosen = {name: text for name, text in MODES.items() if options.only in name}
    if options.only in MODES:
        chosen = {options.only: MODES[options.only]}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        given, whole = options.arguments, options.whole
        runs = [
            pool.submit(
                run_mode,
                *(name, text, given or arguments_of(name, whole=whole)),
                share=not (given or whole),
            )
            for name, text in chosen.items()
        ]
        results = [run.result() for run in runs]
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
