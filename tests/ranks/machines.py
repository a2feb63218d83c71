"""Processes on machines with disks of their own, which share a tier above: see test_machines.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import gpuckpt
from gpuckpt import Keep, Tier
from gpuckpt.groups import Group
from gpuckpt.stores import Buffer
from gpuckpt.stores.local import LocalAppender

SHAPE = (600, 50)


def goes_on(group: Group, arguments: dict[str, Any]) -> dict[str, Any]:
    """Resumes, saves some steps, and tells from where it went on and what is up.

    The rank that is to be `killed` is, at its write of that number to the tier.
    """
    disk = Path(arguments["disks"]) / str(arguments["machines"][group.rank])
    far = arguments["far"]
    first, last = (SHAPE[0] * at // group.size for at in (group.rank, group.rank + 1))
    rows = np.zeros((last - first, SHAPE[1]), np.float32)
    state: dict[str, Any] = {
        "table": gpuckpt.Sharded(rows, shape=SHAPE, offset=(first, 0)),
        "w": np.zeros(40_000),
    }
    killed, write = arguments.get("killed", (-1, 0))
    tiers = [Tier(disk), Tier(far, keep=Keep(last=2), linger=20)]
    options: dict[str, Any] = {"keep": Keep(last=1), "group": group, "group_timeout": 4}
    up: list[int] = []
    with mock.patch.object(LocalAppender, "append", _killing(far, killed == group.rank, write)):
        ckpt = gpuckpt.Checkpointer(tiers=tiers, **options)
        done = ckpt.resume(state)
        wrong = int((rows != done).sum() + (state["w"] != -done).sum())
        try:
            for step in range(done + 1, done + 1 + arguments["steps"]):
                rows[:], state["w"][:] = step, -step
                pending = ckpt.save(step, state)
                pending.result(20)
                ckpt.wait(tier="all", timeout=20 if killed < 0 else 2)
                up += [step for one in pending.tiers[1:] if one.outcome == "durable"]
            ckpt.close()
        except gpuckpt.CheckpointError:
            assert killed >= 0
    return {"step": done, "wrong": wrong, "up": up}


def _killing(far: str, is_killed: bool, write: int) -> Any:
    append, count = LocalAppender.append, 0

    def kills(file: LocalAppender, parts: Sequence[Buffer]) -> None:
        nonlocal count
        if is_killed and far in str(file._path):
            count += 1
            if count == write:
                os.kill(os.getpid(), signal.SIGKILL)
        append(file, parts)

    return kills
