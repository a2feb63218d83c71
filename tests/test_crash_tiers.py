"""Machines that bring a step up together: each may be cut off anywhere, or all lose their power."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

import gpuckpt
from gpuckpt import Keep
from gpuckpt.commit import steps
from gpuckpt.resources import Resources
from gpuckpt.stores.memory import MemoryStore
from gpuckpt.tierstats import TierStats
from gpuckpt.verify import verify_step
from tests.crash_store import CrashStore, Image, Operation, losses, syncs
from tests.often import some
from tests.test_tiers_of_machines import NODES, Rank, live, soon, whole

__all__ = ["soon"]  # a fixture

LEADS = (0, 2)
TIER = {"keep": Keep(last=1), "linger": 0.05}


class Shared(CrashStore):
    """A tier that several machines write to at the same time, each as a client."""

    def __init__(self, image: Image = ()) -> None:
        super().__init__(image)
        self._turn = threading.RLock()

    def do(self, operation: Operation) -> None:
        with self._turn:
            super().do(operation)

    def names(self) -> list[str]:
        self.check()
        return super().names()


class Machines:
    """Two machines with three ranks, and what was said to be durable in the tier above."""

    def __init__(self, far: Shared, disks: list[MemoryStore] | None = None) -> None:
        self.far, self.disks = far, disks or [MemoryStore(), MemoryStore()]
        self.clients: list[Any] = [far.of_client(rank) for rank in range(len(NODES))]
        self.said: set[int] = set()

    @contextlib.contextmanager
    def saying(self) -> Iterator[None]:
        """Until the end of the block it is noted what is said to be durable."""
        finish = TierStats.finish

        def finish_and_say(stats: TierStats, outcome: Any, error: Any = None) -> None:
            if outcome == "durable" and stats.root == self.far.root:
                self.said.add(stats.step)
                self.far.promise(frozenset((step, step) for step in self.said))
            finish(stats, outcome, error)

        with (
            mock.patch.object(TierStats, "finish", finish_and_say),
            warnings.catch_warnings(action="ignore"),
        ):
            yield

    def save(self, lead: int = 0, kill: int | None = None, *, last: int = 3) -> int:
        """Steps go up, to the last; how many operations that rank had after the first.

        It is cut off from the tier before the one of that number.
        """
        count = itertools.count()

        def work(rank: Rank) -> None:
            rank.save(1)
            if rank.group.rank == lead:
                self.clients[lead].kills = lambda _: next(count) == kill
            for step in range(2, last + 1):
                rank.save(step, up=kill is None)

        with self.saying():
            live(NODES, self.disks, self.clients, work, TIER, on_error="warn", full_every=2)
        return next(count)

    def go_on(self) -> list[int]:
        """What the tier has once the next run has brought up what was left behind, and a step."""

        def waits(rank: Rank) -> None:
            rank.ckpt.wait(tier="all", timeout=20)
            rank.group.barrier(what="up", timeout=20)
            assert found(self.far) >= {rank.resume()}
            rank.save(4)

        with warnings.catch_warnings(action="ignore"):
            live(NODES, self.disks, [self.far.of_client(rank) for rank in range(3)], waits, TIER)
        return whole(self.far)


def found(far: Any) -> set[int]:
    """The steps that are there, each whole."""
    for step in steps(far):
        assert verify_step(far, step, Resources("64 MiB")) == []
        assert (gpuckpt.load("", step, store=far)["table"] == step).all()
    return set(steps(far))


@pytest.mark.parametrize("lead", LEADS)
def test_a_lead_that_is_cut_off_before_any_operation_leaves_the_tier_whole_for_the_next_run(lead):
    every = Machines(Shared()).save(lead, last=2)
    print(f"rank {lead}: {every} operations")
    assert every > 8
    for kill in some(range(every)):
        cut = Machines(Shared())
        cut.save(lead, kill, last=2)
        there = found(CrashStore(cut.far.image()))
        assert max(there) >= max(cut.said), kill
        anew = Machines(Shared(cut.far.image()), cut.disks)
        assert anew.go_on() == [4], kill


def test_a_loss_of_power_leaves_what_was_said_to_be_durable_above_or_something_newer():
    machines = Machines(Shared())
    machines.save(last=2)
    every = list(losses(machines.far.record))
    for loss in random.Random(5).sample(every, min(150, len(every))):
        there = found(CrashStore(loss.image))
        promised = max((step for step, _ in loss.promise), default=0)
        assert max(there, default=0) >= promised
    print(f"{len(every)} reboots")
    assert len(every) > 100


def test_without_the_syncs_of_names_or_of_files_some_reboot_finds_damage():
    machines = Machines(Shared())
    machines.save()
    record = machines.far.record
    needed = set()
    for at in syncs(record):
        if record[at].place in needed:
            continue
        for loss in losses(record, at, deaf=at):
            try:
                there = found(CrashStore(loss.image))
                promised = max((step for step, _ in loss.promise), default=0)
                assert max(there, default=0) >= promised
            except (gpuckpt.CheckpointError, AssertionError):
                needed.add(record[at].place)
                break
    files = {place.rpartition("/")[2] for place, _ in needed}
    assert files >= {"shipping.py", "carrier.py", "commit.py", "__init__.py"}
