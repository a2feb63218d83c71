"""Ranks that have one root, and tiers above it."""

from __future__ import annotations

from typing import Any

import numpy as np

import gpuckpt
from gpuckpt.commit import open_step, steps
from gpuckpt.groups import Group
from gpuckpt.stores.memory import MemoryStore
from tests.ranks import run_ranks

SHAPE = (900, 40)


def state_of(group: Group, value: float) -> dict[str, Any]:
    first, last = (SHAPE[0] * at // group.size for at in (group.rank, group.rank + 1))
    rows = np.full((last - first, SHAPE[1]), value, np.float32)
    return {
        "table": gpuckpt.Sharded(rows, shape=SHAPE, offset=(first, 0)),
        "w": np.full((300, 300), value),
        "own": gpuckpt.PerRank({"rank": group.rank}),
    }


def opened(group: Group, near: MemoryStore, far: MemoryStore, **options: Any) -> Any:
    tiers = [gpuckpt.Tier("near", store=near), gpuckpt.Tier("far", store=far)]
    return gpuckpt.Checkpointer(
        tiers=tiers, group=group, group_timeout=20, memory="64 MiB", **options
    )


def test_steps_of_all_ranks_go_up_and_come_back_on_any_number_of_them():
    near, far = MemoryStore(), MemoryStore()

    def save(group: Group) -> None:
        state = state_of(group, 0)
        with opened(group, near, far, keep=gpuckpt.Keep(last=1)) as ckpt:
            for step in (1, 2, 3):
                with ckpt.update():
                    state["table"].array[:] = step
                    state["w"][:] = step
                ckpt.save(step, state).result(20)
            ckpt.wait(tier="all", timeout=20)

    def resume(group: Group) -> None:
        state = state_of(group, -1)
        with opened(group, lost, far) as ckpt:
            assert ckpt.resume(state) == 3
            assert (state["table"].array == 3).all()
            assert (state["w"] == 3).all()
            ckpt.save(4, state).result(20)

    run_ranks(3, save)
    assert steps(near) == [3]
    assert steps(far)[-1] == 3
    whole = open_step(far)
    assert whole.ranks == 3
    assert not whole.absent
    lost = MemoryStore()
    run_ranks(2, resume)
    assert steps(lost) == [4]
    assert (gpuckpt.load("", store=lost)["table"] == 3).all()
