"""`python -m bench [--out FILE] [--only WORD]`: run every case, print a table, write JSON.

Small tensors are saved from numpy and, where cupy has a device, from there: a
real GPU or, with `GPUCKPT_STANDIN=mode=async`, the stand-in, whose figures are
the host's work alone.  Exits with 1 if a limit that a case states isn't kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.cases import roundtrip, stall
from bench.codecs import codecs
from bench.coding import coding
from bench.device import NoGpuError, open_what_is_there
from bench.machine import machine
from bench.read import read
from bench.small import small_tensors
from bench.timing import show, write_report
from bench.write import saves, write

MIB = 1 << 20

Case = tuple[str, Callable[[], dict[str, Any]]]


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--directory", type=Path, help="a directory on the disk to measure")
    parser.add_argument("--only", default="", help="the cases whose names begin so")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        where = machine(Path(name))
        for case, run in _cases(Path(name)):
            if case.startswith(options.only):
                results.append(run())
                show(results[-1])
    if options.out:
        write_report(options.out, {"machine": where, "results": results})
    kept = all(row.get("kept", True) for row in results)
    print("every stated limit is kept" if kept else "a stated limit is NOT kept")
    return 0 if kept else 1


def _cases(directory: Path) -> Iterator[Case]:
    """Each with its name."""
    for nbytes, tensors in ((64 * MIB, 16), (512 * MIB, 100)):
        yield "stall", lambda: stall(directory / f"stall-{nbytes}", nbytes, tensors)  # noqa: B023 - run before the next
    yield "codecs", lambda: codecs(directory / "codecs", 1024 * MIB, 100)
    yield "write", lambda: write(directory / "write", 512 * MIB)
    for codec in ("auto", "raw"):
        yield "write", lambda: saves(directory / "saves", 512 * MIB, 100, codec)  # noqa: B023 - run before the next
        yield "roundtrip", lambda: roundtrip(directory, 512 * MIB, 100, codec)  # noqa: B023 - run before the next
    for cache in ("cold", "warm"):
        reads = directory / f"read-{cache}"
        yield "read", lambda: read(reads, 512 * MIB, 100, cache)  # noqa: B023 - run before the next
    for mode in ("copy", "hold"):
        small = directory / f"small-numpy-{mode}"
        yield "small", lambda: small_tensors(small, np.array, "numpy", "cpu", mode)  # noqa: B023 - run before the next
    yield "coding", coding
    try:
        device = open_what_is_there()
    except NoGpuError as error:
        print(f"small tensors of cupy aren't measured: {error}")
        return
    import cupy

    for mode in ("copy", "hold"):
        small = directory / f"small-cupy-{mode}"
        yield "small", lambda: small_tensors(small, cupy.asarray, "cupy", device, mode)  # noqa: B023 - run before the next


if __name__ == "__main__":
    sys.exit(main())
