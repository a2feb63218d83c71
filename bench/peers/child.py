"""`python -m bench.peers.child TASK`: one measurement in a process of its own.

TASK is JSON: `peer` (a name, or `limits`), `workload` (a directory of the
cache), `directory` (to be made, on the disk to measure), `loop` (or nothing),
`saves` (so many beside it) and `out`, a file for the figures as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from bench.peers.cache import open_workload
from bench.peers.catalogue import description_of
from bench.peers.limits import LIMITS, limits
from bench.peers.measure import measure
from bench.peers.process import OthersWatch


def main() -> None:
    """Measure, and write the figures or why there are none."""
    task = json.loads(sys.argv[1])
    outcome: dict[str, Any]
    try:
        outcome = {"figures": run(task)}
    except Exception as error:
        traceback.print_exc()
        outcome = {"failure": f"{type(error).__name__}: {error}"}
    out = Path(task["out"])
    out.with_suffix(".part").write_text(json.dumps(outcome), encoding="utf-8")
    out.with_suffix(".part").rename(out)
    sys.stdout.flush()
    sys.stderr.flush()
    # Some libraries' threads and processes outlive an ordinary exit, or hang in it.
    os._exit(0)


def run(task: dict[str, Any]) -> dict[str, Any]:
    """The figures of one task."""
    workload = open_workload(Path(task["workload"]))
    directory = Path(task["directory"])
    if task["peer"] == LIMITS:
        directory.mkdir()
        with OthersWatch() as others:
            figures = limits(workload, directory)
        return {**figures, "others_share": others.share}
    peer = description_of(task["peer"])
    return measure(peer, workload, directory, task["loop"], task["saves"])


if __name__ == "__main__":
    main()
