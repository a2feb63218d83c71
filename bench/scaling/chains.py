"""What a chain of deltas costs, link by link."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import gpuckpt
from bench.disk import drop_cache
from bench.scaling.saves import BUFFERS_NBYTES, Row, one_save
from bench.scaling.states import fine_tuning, like
from bench.timing import spread, spreads

# A loop saves one state in one way: what is measured of it stays.
_FIGURES = ("stall_s", "durable_s", "cpu_s", "written_nbytes", "restore_cold_s", "restore_warm_s")


def chains(directory: Path, nbytes: int, tensors: int, links: int, rounds: int) -> list[Any]:
    """A row for each length of a chain up to `links`, and one for each `full_every`.

    The first chain isn't counted.  Every save is of a state that took one step
    since the one before; each is restored, first cold, then warm.
    """
    states = fine_tuning(nbytes, tensors)
    state = next(states)
    target = like(state)
    found: dict[int, list[Row]] = defaultdict(list)
    with gpuckpt.Checkpointer(
        directory,
        every=gpuckpt.Every(steps=1),
        codec="delta",
        snapshot="hold",
        memory=nbytes + BUFFERS_NBYTES,
        full_every=links,
    ) as ckpt:
        length = -1
        for step in range(1, (rounds + 1) * links + 1):
            next(states)
            row = one_save(ckpt, state, step)
            length = length + 1 if row["delta_nbytes"] else 0
            row |= _restored(ckpt, directory, target)
            assert all((target[name] == array).all() for name, array in state.items())
            if step > links:
                found[length].append({name: row[name] for name in _FIGURES})
    facts = {"state_nbytes": nbytes, "tensors": tensors, "dtype": "bfloat16", "codec": "delta"}
    rows = [
        {"case": "chain", **facts, "links": at, "rounds": len(some), **spreads(some)}
        | {"state_over_written": spread([nbytes / row["written_nbytes"] for row in some])}
        for at, some in sorted(found.items())
    ]
    return [*rows, *(_period(rows, nbytes, every) for every in range(1, len(rows) + 1))]


def _restored(ckpt: gpuckpt.Checkpointer, directory: Path, target: Any) -> Row:
    drop_cache(directory)
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        ckpt.restore(target)
        times.append(time.perf_counter() - begun)
    return {"restore_cold_s": times[0], "restore_warm_s": times[1]}


def _period(rows: list[Any], nbytes: int, saves: int) -> dict[str, Any]:
    """The mean of a whole save and the deltas after it: computed from the medians of each."""
    some = rows[:saves]
    written = sum(row["written_nbytes"]["median"] for row in some) / saves
    return {
        "case": "chain-period",
        "saves": saves,
        "mean_written_over_state": written / nbytes,
        "mean_durable_s": sum(row["durable_s"]["median"] for row in some) / saves,
        "longest_restore_cold_s": some[-1]["restore_cold_s"]["median"],
    }
