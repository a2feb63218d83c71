"""`python -m bench.gpu [--out FILE]`: limits of a GPU, then everything as a share of them.

Exits with 3 where there is no GPU.  `--stand-in` runs everything once on tiny
sizes, to see that it runs: such figures mean nothing and aren't results.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.device import STAND_IN, NoGpuError, describe, open_gpu, open_stand_in
from bench.gpu.scale import MIB, TINY, Scale, full
from bench.machine import machine
from bench.timing import show, write_report
from gpuckpt.sizes import parse_nbytes

NO_GPU = 3
RESULTS = Path(__file__).parents[1] / "results"
CASES = ("kernels", "saves", "restores", "differences", "peer")
CHANGED_NBYTES_MAX = 256 * MIB  # their values are made on the host, at each step


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, help="write JSON here; in a directory, named by the GPU"
    )
    parser.add_argument("--directory", type=Path, help="a directory on the disk to measure")
    parser.add_argument("--stand-in", action="store_true", help="tiny sizes, without a GPU")
    parser.add_argument("--only", choices=CASES, nargs="+", default=CASES, help="some of the cases")
    parser.add_argument("--states", type=parse_nbytes, nargs="+", help='their sizes: "2 GiB"')
    parser.add_argument("--rounds", type=int, help="fewer or more, of states below 2 GiB")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the report is written all the same
    if options.stand_in and options.out and _is_result(options.out):
        parser.error("the stand-in's figures aren't results; write them elsewhere")
    try:
        device = open_stand_in() if options.stand_in else open_gpu()
    except NoGpuError as error:
        print(f"nothing was measured: {error}", file=sys.stderr)
        return NO_GPU
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name)
        report: dict[str, Any] = {"machine": machine(directory) | describe(device)}
        try:
            scale = _scale(device, directory)
            given = {"states_nbytes": options.states, "rounds": options.rounds}
            scale = replace(scale, **{name: value for name, value in given.items() if value})
            measure(directory, scale, report, options.only)
        finally:  # what was measured before a failure is worth keeping
            if options.out:
                write_report(_path(options.out, device), report)
    return 0


def measure(
    directory: Path, scale: Scale, report: dict[str, Any], cases: Sequence[str] = CASES
) -> None:
    """Limits first; then the cases: all into the report, as they come."""
    from bench.gpu.limits import limits

    best, rows = limits(directory, scale)
    report |= {"scale": asdict(scale), "limits": asdict(best), "results": rows}
    for row in rows:
        show(row)
    for row in _results(directory, scale, best, cases):
        rows.append(row)
        show(row)


def _results(
    directory: Path, scale: Scale, best: Any, cases: Sequence[str]
) -> Iterator[dict[str, Any]]:
    from bench.gpu.differences import difference_rows
    from bench.gpu.kernels import kernel_rows
    from bench.gpu.peer import peer_rows
    from bench.gpu.restores import restore_rows
    from bench.gpu.saves import save_rows
    from bench.gpu.training import Training

    changed = min(scale.states_nbytes[-1] // 2, CHANGED_NBYTES_MAX)
    rows: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "kernels": lambda: kernel_rows(scale, best),
        "saves": lambda: save_rows(
            directory, scale, best, Training(scale.step_seconds, scale.step_side)
        ),
        "restores": lambda: restore_rows(directory, scale, best),
        "differences": lambda: difference_rows(directory, changed, max(scale.rounds // 2, 2)),
        "peer": lambda: peer_rows(directory, scale),
    }
    for case in cases:
        yield from rows[case]()


def _scale(device: str, directory: Path) -> Scale:
    if device == STAND_IN:
        return TINY
    import cupy

    free = cupy.cuda.runtime.memGetInfo()[0], shutil.disk_usage(directory).free
    return full(*free)


def _is_result(out: Path) -> bool:
    return RESULTS in (out.resolve(), *out.resolve().parents)


def _path(out: Path, device: str) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return out / f"gpu-{name}-{time.strftime('%Y-%m-%d')}.json" if out.is_dir() else out


if __name__ == "__main__":
    sys.exit(main())
