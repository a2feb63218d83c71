"""Several ranks save together and restore together; any number of them afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuckpt
from gpuckpt.commit import open_step
from gpuckpt.errors import RankError
from gpuckpt.groups import Group
from gpuckpt.stores import Store
from gpuckpt.stores.memory import MemoryStore
from tests.ranks import run_ranks

N = 1 << 18


def saver(store: Store, group: Group, **options: Any) -> gpuckpt.Checkpointer:
    options = {"memory": "64 MiB", "group_timeout": 20} | options
    return gpuckpt.Checkpointer("", store=store, group=group, **options)


def replicated(seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "w": random.standard_normal((256, N // 256), np.float32),
        "b": random.standard_normal(16, np.float32),
        "scale": np.array(2.5),
        "lr": 0.1,
        "layers": [{"w": random.standard_normal((64, 1024), np.float32)} for _ in range(3)],
    }


def test_replicas_are_written_once_and_evenly():
    store = MemoryStore()
    state = replicated()

    def work(group: Group) -> int:
        with saver(store, group, codec="raw") as ckpt:
            return ckpt.save(1, state).result(20).raw_nbytes

    assert len(set(run_ranks(4, work))) == 1
    manifest = open_step(store)
    assert manifest.ranks == 4
    written = [part.raw_nbytes for part in manifest.parts]
    whole = sum(v.nbytes for v in [state["w"], state["b"], *(x["w"] for x in state["layers"])])
    assert sum(written) == whole + 4 * state["scale"].nbytes
    assert max(written) < 1.05 * whole / 4


def test_every_rank_resumes_from_what_all_have_saved():
    store = MemoryStore()

    def work(group: Group) -> None:
        state = replicated()
        with saver(store, group) as ckpt:
            for step in (1, 2, 3):
                state["w"] += 1
                ckpt.save(step, state)
        fresh = replicated(1)
        with saver(store, group) as ckpt:
            assert ckpt.resume(fresh) == 3
        np.testing.assert_equal(fresh, state)

    run_ranks(3, work)
