"""`python -m bench.durability.flips --count 10000`: bits flipped on the disk and in memory.

Of each flip one of two things must be true: an error names the tensor that was
hit (or the file, where that isn't a tensor's), or every byte comes back right.
Ends with 1 if neither was true of any.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from bench.durability.flip_states import CODECS, make_root
from bench.durability.flipped_files import flip_file, places
from bench.durability.flipped_memory import flips as memory_flips
from bench.durability.outcomes import Outcome, counted, flipped, lines
from bench.machine import machine
from bench.timing import write_report

DISK_SHARE = 0.6
OF_TENSORS = 4  # flips in a kind of chunk for one in a header, an index, a manifest


def run(count: int, seed: int, directory: Path | None = None) -> dict[str, Any]:
    """Flip `count` bits; the same ones for the same seed, but for what threads do."""
    rng, begun = random.Random(seed), time.monotonic()
    on_disk = int(count * DISK_SHARE)
    with tempfile.TemporaryDirectory(dir=directory, prefix="flips-") as name:
        where = machine(Path(name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcomes = list(islice(disk_flips(Path(name), rng, seed), on_disk))
            outcomes += islice(memory_flips(Path(name), rng), count - on_disk)
    table, faults = counted(outcomes)
    where["seconds"] = round(time.monotonic() - begun)
    return {
        "machine": where,
        "count": flipped(outcomes),
        "seed": seed,
        "places": table,
        "faults": faults,
    }


def disk_flips(directory: Path, rng: random.Random, seed: int) -> Iterator[Outcome]:
    """Flips without end, by codec and kind of place in turn."""
    roots = [make_root(directory / f"disk-{codec}", codec, seed) for codec in CODECS]
    found = [(root, places(root)) for root in roots]
    at = 0
    while True:
        for root, kinds in found:
            for kind in sorted(kinds):
                for _ in range(OF_TENSORS if kinds[kind][0].tensors else 1):
                    yield flip_file(root, rng.choice(kinds[kind]), rng, at)
            at += 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; 1 if there was a fault."""
    parser = argparse.ArgumentParser("python -m bench.durability.flips", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--directory", type=Path, help="a directory on the disk to be written to")
    parser.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args(arguments)
    logging.getLogger("gpuckpt").setLevel(logging.ERROR)  # what is found is counted here
    results = run(options.count, options.seed, options.directory)
    print("\n".join(lines(results)))
    if options.out:
        write_report(options.out, results)
    return 1 if results["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
