"""`python -m bench.scaling [--out FILE]`: how costs grow, beside this machine's limits.

Saves and restores of normally distributed float32 (deltas: bfloat16), by size,
by number of tensors, by cores and by length of a chain; then a model of them,
fitted to half of the points and checked against the others.  About seven minutes
on two cores and a disk of 1.5 GB/s; 7 GiB of memory, 8 GiB of disk.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.machine import machine
from bench.scaling.chains import chains
from bench.scaling.child import in_child
from bench.scaling.extrapolate import extrapolated
from bench.scaling.fit import fitted
from bench.scaling.model import Costs
from bench.scaling.profile import profile
from bench.scaling.saves import COPIED, Way, in_turn
from bench.scaling.sizes import FULL, QUICK, Scale
from bench.scaling.states import weights
from bench.timing import show, write_report

Rows = Iterator[dict[str, Any]]


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser("python -m bench.scaling", description=__doc__)
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--directory", type=Path, help="a directory on the disk to measure")
    parser.add_argument("--quick", action="store_true", help="next to nothing, for a test")
    options = parser.parse_args()
    begun, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        where = machine(Path(name))
        for row in measured(Path(name), QUICK if options.quick else FULL):
            rows.append(row)
            show(row)
    model = fitted(rows, where["cores"])
    far = extrapolated(rows, Costs(**model["costs"]))
    for what, errors in model["errors"].items():
        print(f"the model's {what}, where it wasn't fitted:", end=" ")
        print(f"wrong by {errors['median']:.0%} (median), {errors['worst']:.0%} (worst)")
    if options.out:
        where["seconds"] = round(time.monotonic() - begun)
        report = {"machine": where, "results": rows, "model": model, "extrapolation": far}
        write_report(options.out, report)


def measured(directory: Path, scale: Scale) -> Rows:
    """All rows, each case in a directory of its own, which is deleted after it."""
    cases = (_profiled, _sized, _counted, _on_cores, _chained)
    for at, case in enumerate(cases):
        place = directory / str(at)
        place.mkdir()
        yield from case(place, scale)
        shutil.rmtree(place)


def _profiled(_: Path, scale: Scale) -> Rows:
    yield from profile(scale.profile_nbytes, scale.rounds)


def _sized(directory: Path, scale: Scale) -> Rows:
    for nbytes in scale.sizes:
        place = directory / str(nbytes)
        place.mkdir()
        state = weights(nbytes, scale.tensors)
        ways = (*COPIED, Way("hold", "raw"))
        for row in in_turn(place, state, ways, scale.rounds):
            yield {"case": "size"} | row
        shutil.rmtree(place)


def _counted(directory: Path, scale: Scale) -> Rows:
    for tensors in scale.counts:
        place = directory / str(tensors)
        place.mkdir()
        state = weights(scale.counted_nbytes, tensors)
        ways = (Way("copy", "raw"), Way("hold", "raw"))
        few = tensors <= scale.restored_counts
        for row in in_turn(place, state, ways, scale.rounds, restored=few, limited=False):
            yield {"case": "count"} | row
        shutil.rmtree(place)


def _on_cores(directory: Path, scale: Scale) -> Rows:
    for cores in scale.cores:
        place = directory / str(cores)
        place.mkdir()
        yield from in_child("cores", place, cores, scale.cores_nbytes, scale.tensors, scale.rounds)
        shutil.rmtree(place)
    yield from in_child("memory", directory, scale.memory_nbytes, scale.tensors)


def _chained(directory: Path, scale: Scale) -> Rows:
    yield from chains(directory, scale.chain_nbytes, scale.tensors, scale.links, scale.rounds)


if __name__ == "__main__":
    main()
