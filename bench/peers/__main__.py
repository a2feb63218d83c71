"""`python -m bench.peers --out FILE`: save the same state with every peer, in rotation.

What each workload and figure is: bench/README.md.  A peer that isn't installed
or fails is in the report with the reason.  Nothing is measured twice at once:
run it where nothing else runs.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.machine import machine
from bench.peers.cache import Workload
from bench.peers.catalogue import catalogue
from bench.peers.limits import LIMITS
from bench.peers.loops import THREADS
from bench.peers.peer import Description
from bench.peers.rotation import Rotation, Row, Task
from bench.peers.spawn import Spawner
from bench.peers.workloads import NAMES, workload
from bench.timing import write_report

_SETTINGS = ("rounds", "size", "quiet_share", "repeats", "saves")


def main() -> int:
    """Measure, and write after each row, so that nothing is lost."""
    options = parser().parse_args()
    described = chosen(options.only)
    rotation = Rotation(
        tasks(options),
        options.rounds,
        options.quiet_share,
        options.repeats,
    )
    with tempfile.TemporaryDirectory(prefix="peers-", dir=options.directory) as name:
        report = facts(Path(name), described, vars(options))
        states = {
            one: workload(one, options.size, options.cache)
            for one in dict.fromkeys(options.workloads)
        }
        report["workloads"] = {one: about(state) for one, state in states.items()}
        rows: list[Row] = []
        report["rows"] = rows
        for row in rotation.rows(Spawner(states, Path(name), options.timeout, options.saves)):
            rows.append(row)
            show(row)
            if options.out:
                write_report(options.out, report)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    names = [one.name for one in catalogue()]
    made = argparse.ArgumentParser("python -m bench.peers", description=__doc__)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--size", type=nbytes_of, default="1GB", help="of the state in float32")
    made.add_argument("--workloads", nargs="+", choices=NAMES, default=["trained-f32"])
    made.add_argument("--only", nargs="+", choices=names, default=[], help="these peers alone")
    made.add_argument("--loops", action="store_true", help="saves beside training loops, too")
    made.add_argument("--loops-only", action="store_true", help="nothing but these")
    made.add_argument("--saves", type=int, default=3, help="of one process, beside a loop")
    made.add_argument("--out", type=Path, help="write JSON here")
    made.add_argument("--cache", type=Path, default=Path("build/bench-cache"), help="of the states")
    made.add_argument("--directory", type=Path, default=Path(), help="on the disk to measure")
    made.add_argument("--timeout", type=float, default=300.0, help="seconds for one peer")
    made.add_argument("--quiet-share", type=float, default=0.15, help="others' share of the CPU")
    made.add_argument("--repeats", type=int, default=2, help="of a row that others disturbed")
    return made


def nbytes_of(text: str) -> int:
    """Bytes of `100MB`, `1.5 GB` or a plain number, by the thousand."""
    found = re.fullmatch(r"([\d.]+)\s*([kMG]?)B?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"a size is like 100MB or 4GB; got {text!r}")
    return int(float(found[1]) * {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}[found[2]])


def chosen(only: list[str]) -> list[Description]:
    """These peers, or all."""
    return [one for one in catalogue() if not only or one.name in only]


def tasks(options: argparse.Namespace) -> list[Task]:
    """The limits and every peer for each workload; beside each loop the asynchronous ones."""
    described, made = chosen(options.only), []
    for one in options.workloads:
        if not options.loops_only:
            made.append(Task(one, LIMITS))
            made += [Task(one, peer.name) for peer in described]
        if options.loops or options.loops_only:
            beside = [peer.name for peer in described if peer.background]
            made += [Task(one, name, loop) for loop in THREADS for name in beside]
    return made


def facts(directory: Path, described: list[Description], options: dict[str, Any]) -> dict[str, Any]:
    """The machine, the settings, and what each peer is."""
    packages = sorted({package for one in described for package in one.packages})
    return {
        "machine": machine(directory) | {"packages": {one: version_of(one) for one in packages}},
        "settings": {name: options[name] for name in _SETTINGS},
        "peers": {one.name: {"how": one.how, "syncs": one.syncs} for one in described},
    }


def version_of(package: str) -> str:
    """As installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def about(state: Workload) -> dict[str, Any]:
    """What a workload is."""
    return {"nbytes": state.nbytes, "tensors": len(state.entries), **state.facts}


def show(row: Row) -> None:
    """One line a row."""
    figures = row["figures"]
    names = ("blocked_s", "durable_s", "lost_s", "restore_cold_s", "write_s", "memcpy_s")
    known = [f"{name} {figures[name]:.3f}" for name in names if name in figures]
    loud = [] if row["quiet"] else [f"others {figures['others_share']:.0%}"]
    words = [row["workload"], f"round {row['round']}", row["peer"], row["loop"], *known, *loud]
    print(", ".join([word for word in words if word] + [row["failure"]] * bool(row["failure"])))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
