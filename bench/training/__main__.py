"""`python -m bench.training [--out FILE]`: what deltas save in real training runs.

Runs of a minute or some, seeded: the demo's transformer with Adam in three
precisions, all-MiniLM-L6-v2 fine-tuned and with adapters (if PyTorch and its
weights are there), an embedding table.  Each is saved 1, 10 and 100 steps apart
with `codec="delta"`, and whole with other codecs; on the same pairs of states,
ZipNN (if it is there) and zstd code their XOR.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.machine import machine
from bench.timing import write_report
from bench.training.cases import CASES, Case, all_runs
from bench.training.finetuning import missing
from bench.training.lanes import Lane, Row
from bench.training.rivals import rivals
from bench.training.runs import FULL, QUICK, Run, Scale, State, nbytes_of

WHOLE = ("raw", "auto", "zstd")
WHOLE_SAVES = 2


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser("python -m bench.training", description=__doc__)
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--directory", type=Path, help="a directory on the disk to save to")
    parser.add_argument("--only", nargs="+", choices=list(CASES), help="these runs alone")
    parser.add_argument("--quick", action="store_true", help="next to nothing, for a test")
    options = parser.parse_args()
    scale = QUICK if options.quick else FULL
    begun, wanted = time.monotonic(), options.only or list(CASES)
    absent = {} if not missing() else {"fine-tuning": missing()}
    done: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        where = machine(Path(name)) | {"packages": _packages()}
        for run in (run for run in all_runs() if run.name in wanted):
            done.append(measured(run, Path(name), scale))
            if options.out:
                where["seconds"] = round(time.monotonic() - begun)
                write_report(options.out, {"machine": where, "not_measured": absent, "runs": done})


def measured(run: Run, directory: Path, scale: Scale) -> dict[str, Any]:
    """All saves of one run."""
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        lanes: list[tuple[Case, Lane]] = []
        for step, state in enumerate(run.begin(scale)):
            if not step:
                lanes = list(_lanes(stack, directory / run.name, CASES[run.name], state, scale))
            for case, lane in lanes:
                if lane.due(step):
                    rows.append({"case": case.name, "step": step} | lane.save(step, rivals()))
                    _show(rows[-1])
    cases = [
        {"name": case.name, "what": case.what, "state_nbytes": nbytes_of(case.of(state))}
        for case in CASES[run.name]
    ]
    facts = {name: value for name, value in run.facts.items() if name != "losses"}
    return {"name": run.name, "what": run.what, "facts": facts, "cases": cases, "rows": rows}


def _lanes(
    stack: contextlib.ExitStack, place: Path, cases: Sequence[Case], state: State, scale: Scale
) -> Iterator[tuple[Case, Lane]]:
    """One for each way and interval."""
    ways = [(codec, scale.intervals[0], WHOLE_SAVES) for codec in WHOLE]
    every = zip(scale.intervals, scale.saves, strict=True)
    ways += [("delta", interval, saves) for interval, saves in every]
    for at, case in enumerate(cases):
        for codec, interval, saves in ways:
            root = place / f"{at}-{codec}-{interval}"
            root.mkdir(parents=True)
            lane = Lane(root, case.of(state), codec, interval, saves)
            yield case, stack.enter_context(lane)


def _packages() -> dict[str, str]:
    """What runs and rivals came from, as far as it is there."""
    names = ("torch", "zipnn")
    return {name: version(name) for name in names if importlib.util.find_spec(name)}


def _show(row: Row) -> None:
    share = row["state_nbytes"] / row["written_nbytes"]
    where = f"{row['case']}, {row['codec']}, step {row['step']}"
    print(f"{where}, link {row['links']}: {share:.2f}", flush=True)


if __name__ == "__main__":
    main()
