"""What a piece of work takes, in a process of its own: seconds of a core, and memory.

Not those of a clock: they say nothing where others work, too.
"""

from __future__ import annotations

import gc
import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def taken(work: Callable[[], Row]) -> Row:
    """What `work` says, `cpu_s` that it timed or that it took, and `peak_nbytes` of memory.

    The peak is the most resident memory of a forked process above what it had
    when it began.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def child() -> None:
        gc.collect()
        gc.freeze()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun = time.process_time()
        try:
            row = work()
            row.setdefault("cpu_s", time.process_time() - begun)
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            there.send(row | {"peak_nbytes": 1024 * (after - before)})
        except BaseException as error:
            there.send({"error": f"{type(error).__name__}: {error}"})
            raise

    process = context.Process(target=child)
    process.start()
    there.close()
    row: Row = here.recv()
    process.join()
    if "error" in row:
        raise RuntimeError(row["error"])
    return row


def timed(work: Callable[[], object], rounds: int = 3) -> dict[str, float]:
    """Seconds of a core that `work` takes: minimum, median and maximum."""
    found = []
    for _ in range(rounds):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    found.sort()
    return {"min": found[0], "median": found[len(found) // 2], "max": found[-1]}
