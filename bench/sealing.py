"""`python -m bench.sealing [--out FILE]`: what a key costs, beside the same save or load without.

Of normally distributed float32, one right after the other, in rounds: the
quotient of seconds, and of CPU seconds of all threads, with a key by without.
"""

from __future__ import annotations

import argparse
import hashlib
import secrets
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import gpuckpt
from bench.machine import machine
from bench.timing import show, write_report

KEY = secrets.token_bytes(32)
Seconds = tuple[float, float]


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser("python -m bench.sealing", description=__doc__)
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--directory", type=Path, help="a directory on the disk to measure")
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        where = machine(Path(name))
        rows = [digests()]
        for codec in ("raw", "auto"):
            rows += measured(Path(name), codec, options.mib, options.rounds)
    for row in rows:
        show(row)
    if options.out:
        write_report(options.out, {"machine": where, "mib": options.mib, "results": rows})


def digests() -> dict[str, Any]:
    """GB a CPU second of a thread that takes nothing but digests, the best of five."""
    data, found = memoryview(bytes(1 << 26)), {}
    for kind in ("sha256", "blake2b"):
        seconds = min(timed(lambda kind=kind: hashlib.new(kind, data))[1] for _ in range(5))  # type: ignore[misc]
        found[f"{kind}_gb_per_cpu_second"] = data.nbytes / seconds / 1e9
    return {"case": "digests", **found}


def measured(directory: Path, codec: str, mib: int, rounds: int) -> list[dict[str, Any]]:
    """Saves, and loads, in turn with a key and without."""
    values = np.random.default_rng(1).standard_normal((16, mib << 14), np.float32)
    state = {f"layer{at}": layer for at, layer in enumerate(values)}
    quotients: dict[str, list[Seconds]] = {"save": [], "load": []}
    for at in range(rounds + 1):  # the first warms up
        taken: dict[tuple[str, bool], Seconds] = {}
        for keyed in (True, False) if at % 2 else (False, True):
            root, key = directory / "root", KEY if keyed else None
            taken["save", keyed] = timed(
                lambda root=root, key=key: gpuckpt.save(root, state, codec=codec, key=key)  # type: ignore[misc]
            )
            taken["load", keyed] = timed(lambda root=root, key=key: gpuckpt.load(root, key=key))  # type: ignore[misc]
            shutil.rmtree(root)
        for what, found in quotients.items() if at else ():
            one, other = taken[what, True], taken[what, False]
            found.append((one[0] / other[0], one[1] / other[1]))
    return [
        {"case": f"{what} {codec}", **_of("seconds", found, 0), **_of("cpu", found, 1)}
        for what, found in quotients.items()
    ]


def timed(work: Callable[[], object]) -> Seconds:
    """Seconds, and CPU seconds of this process."""
    begun, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begun, time.process_time() - cpu


def _of(name: str, found: list[Seconds], at: int) -> dict[str, float]:
    values = [one[at] for one in found]
    return {
        f"{name}_least": min(values),
        f"{name}_median": statistics.median(values),
        f"{name}_most": max(values),
    }


if __name__ == "__main__":
    main()
