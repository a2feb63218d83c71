"""`python -m bench.ranks [--out FILE]`: what 1 to 16,384 ranks cost, in simulation.

The engine's own code, in one process at a time: the files of a step of many ranks
and what reading them takes; what ranks tell each other; the lead's commit in a
directory of all files; rounds of ranks that are threads.  The others are played.
No tensors are written: rows are those of a model's, checks in them are random.
About ten minutes on two cores, and 4 GiB of memory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.machine import machine
from bench.ranks.alone import Row
from bench.ranks.directory import committing
from bench.ranks.files import rows
from bench.ranks.layouts import KINDS, WRITTEN
from bench.ranks.meetings import meeting
from bench.ranks.rounds import sharing
from bench.ranks.sizes import FULL, MOST, QUICK, Scale
from bench.timing import show, write_report


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser("python -m bench.ranks", description=__doc__)
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--directory", type=Path, help="a directory on the disk to measure")
    parser.add_argument("--quick", action="store_true", help="next to nothing, for a test")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES, help="cases")
    parser.add_argument("--most", type=int, default=MOST, help="ranks")
    options = parser.parse_args()
    scale = (QUICK if options.quick else FULL).up_to(options.most)
    begun, found = time.monotonic(), []
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        where = machine(Path(name))
        for case in options.only:
            for row in CASES[case](scale, Path(name)):
                found.append(row)
                show(row)
    if options.out:
        where["seconds"] = round(time.monotonic() - begun)
        write_report(options.out, {"machine": where, "results": found})


def _files(scale: Scale, _: Path) -> Iterator[Row]:
    yield from rows((kind, *size) for kind in WRITTEN for size in scale.shared)


def _share(scale: Scale, _: Path) -> Iterator[Row]:
    yield from (sharing(kind, *size) for kind in KINDS for size in scale.shared if size[0] > 1)


def _commit(scale: Scale, directory: Path) -> Iterator[Row]:
    yield from (committing(directory / "root", ranks) for ranks in scale.directories if ranks > 1)


def _meeting(scale: Scale, _: Path) -> Iterator[Row]:
    yield from map(meeting, scale.meetings)


CASES = {"files": _files, "share": _share, "commit": _commit, "meeting": _meeting}


if __name__ == "__main__":
    main()
