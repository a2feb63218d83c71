"""Real processes on machines with roots of their own, and a tier above that they share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import gpuckpt
from gpuckpt.commit import steps
from gpuckpt.resources import Resources
from gpuckpt.stores.local import LocalStore
from gpuckpt.verify import verify_step
from tests.launch import launch

MACHINES = (0, 0, 1, 1)


def lives(place: Path, name: str, machines: tuple[int, ...] = MACHINES, **task: Any) -> list[Any]:
    defaults: dict[str, Any] = {"disks": str(place / "disks"), "far": str(place / "far")}
    task = defaults | {"steps": 2} | task
    work = "tests.ranks.machines:goes_on"
    task["machines"] = machines
    found = launch("store", work, len(machines), place / name, task, timeout=90)
    for rank, one in enumerate(found):
        assert one.error is None or rank == task.get("killed", (-1,))[0], one.output
    return [one.value for one in found]


def whole(far: Path) -> list[int]:
    store = LocalStore(far)
    for step in steps(store):
        assert verify_step(store, step, Resources("64 MiB")) == []
        assert (gpuckpt.load(far, step)["table"] == step).all()
    return steps(store)


@pytest.mark.parametrize(
    ("killed", "write", "machines"), [(0, 6, (0, 0, 1)), (2, 3, MACHINES)], ids=str
)
def test_a_kill_and_a_lost_disk_cost_no_more_than_what_was_not_up(
    killed, write, machines, tmp_path
):
    before = lives(tmp_path, "before")
    assert [(one["step"], one["wrong"]) for one in before] == [(0, 0)] * 4
    assert before[0]["up"] == whole(tmp_path / "far") == [1, 2]
    cut = lives(tmp_path, "cut", killed=(killed, write), steps=5)
    assert [one is None for one in cut] == [rank == killed for rank in range(4)]
    known = max([2, *(step for one in cut if one for step in one["up"])])
    assert max(whole(tmp_path / "far")) >= known
    shutil.rmtree(tmp_path / "disks" / "1")
    after = lives(tmp_path, "after", machines)
    assert {one["wrong"] for one in after} == {0}
    (step,) = {one["step"] for one in after}
    assert step >= known
    assert whole(tmp_path / "far")[-2:] == [step + 1, step + 2]
    names = {path.name for path in (tmp_path / "far").iterdir()}
    assert not [name for name in names if name.startswith("up-")]
