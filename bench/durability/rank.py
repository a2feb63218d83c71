"""A rank of a training run, of which one is there to be killed."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import gpuckpt
from bench.durability.child import left_over
from bench.durability.deaths import OF_RANKS, PLACES, Death, count_all, die_at
from gpuckpt.groups.instore import StoreBoard
from gpuckpt.groups.meeting import Meeting
from gpuckpt.stores.local import LocalStore
from tests.versions import CHUNK, set_to, state_at, version_of

RANK_PLACES = (*PLACES, *OF_RANKS)
# Seconds that the others wait for a rank that is dead.
TIMEOUT, GRACE = 2.0, 1.0
ROWS = 100


class RankLife(NamedTuple):
    """Which root a run saves to, as which of how many ranks, and when it dies by its own hand."""

    root: Path
    board: Path
    rank: int
    size: int
    codec: str
    steps: int
    death: Death | None = None
    counts: bool = False


def rank_state(rank: int, size: int, version: int) -> dict[str, Any]:
    """Replicas, this rank's rows of a table, and what is its own; all known from the version."""
    first, last = ROWS * rank // size, ROWS * (rank + 1) // size
    state = state_at(version)
    rows = np.arange(first, last, dtype=np.float32)[:, None] + np.full((1, 64), version, np.float32)
    state["table"] = gpuckpt.Sharded(rows, shape=(ROWS, 64), offset=(first, 0))
    state["own"] = gpuckpt.PerRank({"at": [rank, version]})
    return state


def set_rank(state: dict[str, Any], rank: int, size: int, version: int) -> None:
    """Make the state another version, in place."""
    table, own = state.pop("table"), state.pop("own")
    set_to(state, version)
    table.array[...] = rank_state(rank, size, version)["table"].array
    own.value["at"] = [rank, version]
    state |= {"table": table, "own": own}


def rank_version(state: dict[str, Any], rank: int, size: int) -> int:
    """Its version, if it is that one in every bit."""
    version = version_of(state)
    expected = rank_state(rank, size, version)
    assert state["table"].array.tobytes() == expected["table"].array.tobytes(), version
    assert state["own"].value == {"at": [rank, version]}, state["own"].value
    return version


def live(life: RankLife, said: Connection, go: Connection) -> None:
    """Resume and train; says what it resumed from, each step that is durable, and what failed."""
    go.recv()
    watches = count_all(RANK_PLACES) if life.counts else {}
    if life.death is not None:
        die_at(life.death)
    group = Meeting(StoreBoard(LocalStore(life.board)), life.rank, life.size, grace=GRACE)
    try:
        _train(life, group, said)
    except gpuckpt.RankError as error:
        said.send(("missed", [list(error.ranks), str(error)]))
    except gpuckpt.CheckpointError as error:
        said.send(("failed", repr(error)))
    group.close(1.0)
    said.send(("counted", {place: watch.count for place, watch in watches.items()}))


def _train(life: RankLife, group: Meeting, said: Connection) -> None:
    state = rank_state(life.rank, life.size, 0)
    with gpuckpt.Checkpointer(
        life.root,
        group=group,
        group_timeout=TIMEOUT,
        every=gpuckpt.Every(steps=1),
        keep=gpuckpt.Keep(last=2),
        codec=life.codec,
        memory="4 MiB",
        chunk_nbytes=CHUNK,
    ) as ckpt:
        if life.rank == 0:
            said.send(("left", left_over(LocalStore(life.root))))
        done = ckpt.resume(state)
        assert rank_version(state, life.rank, life.size) == done
        said.send(("resumed", done))
        for step in range(done + 1, done + 1 + life.steps):
            with ckpt.update():
                set_rank(state, life.rank, life.size, step)
            pending = ckpt.step(step, state)
            assert pending is not None
            pending.result()
            said.send(("durable", step))
