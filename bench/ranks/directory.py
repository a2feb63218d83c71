"""A save's commit by the lead, in a directory of all ranks' files; and its sweeps."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

from bench.ranks.alone import Row, taken
from bench.ranks.counted import Counted
from bench.ranks.layouts import inventory, model, roster
from bench.ranks.simulated import Scripted, echoed, written
from gpuckpt import layout
from gpuckpt.commit import commit, writing
from gpuckpt.joint import Joint
from gpuckpt.manifest import Manifest, Part
from gpuckpt.parts import world_manifest
from gpuckpt.retention import Keep
from gpuckpt.spans import Lap
from gpuckpt.stores.local import LocalStore

KEPT = 2
# As that of the rank that is here: the others echo it.
TOKEN = f"{0:08x}"


def committing(directory: Path, ranks: int) -> Row:
    """The lead's commit of a step of all ranks, two of which are kept, and what opening takes.

    Segments and others' parts are empty files: nobody reads them here.
    """
    try:
        return {"case": "commit", "ranks": ranks} | taken(lambda: _committing(directory, ranks))
    finally:
        shutil.rmtree(directory)


def _committing(directory: Path, ranks: int) -> Row:
    store = Counted(LocalStore(directory))
    shares = roster("replicated", 0, ranks, model(1))
    own = written(inventory(shares), 1, 0)
    for step in range(1, KEPT + 1):
        _touch(directory, step, ranks)
        commit(store, _world(own, step, ranks), abandon=_nothing)
    group = Scripted(0, ranks, lambda _, data: echoed(ranks, data))
    joint = Joint(group, store, keep=Keep(last=KEPT), seal=None, timeout=1)
    joint.share(inventory(shares), KEPT + 1)
    _touch(directory, KEPT + 1, ranks)
    files = len(store.store.names())
    mine = written(inventory(shares), KEPT + 1, 0)
    told, store.calls = len(group.given), type(store.calls)()
    clock, begun = time.perf_counter(), time.process_time()
    joint.commit(mine, TOKEN, _nothing, Lap())
    seconds = {"cpu_s": time.process_time() - begun, "clock_s": time.perf_counter() - clock}
    clock, begun = time.perf_counter(), time.process_time()
    joint.tidy()  # when the others have gone on
    seconds["tidy_cpu_s"] = time.process_time() - begun
    seconds["tidy_clock_s"] = time.perf_counter() - clock
    calls = {f"calls_{name}": count for name, count in store.calls.items()}
    said = {"given_nbytes": group.given[told:], "got_nbytes": group.got[told:]}
    return {"files": files, **seconds, **said, **calls, **_entering(store)}


def _entering(store: Counted) -> Row:
    store.calls = type(store.calls)()
    begun = time.process_time()
    with writing(store):
        seconds = time.process_time() - begun
    begun = time.process_time()
    names = store.names()
    listing = time.process_time() - begun
    return {"enter_cpu_s": seconds, "list_cpu_s": listing, "kept_files": len(names)}


def _names(step: int, ranks: int) -> list[tuple[str, str]]:
    return [
        (
            layout.part_name(step, TOKEN, rank),
            layout.segment_name(step, TOKEN, rank, 0),
        )
        for rank in range(ranks)
    ]


def _touch(directory: Path, step: int, ranks: int) -> None:
    directory.mkdir(exist_ok=True)
    for pair in _names(step, ranks):
        for name in pair:
            (directory / name).touch()


def _world(own: Manifest, step: int, ranks: int) -> Manifest:
    parts = [Part(part, 1, "0" * 32, 1, 1, (segment,)) for part, segment in _names(step, ranks)]
    return world_manifest(parts, replace(own, step=step, ranks=ranks))


def _nothing() -> None:
    pass
