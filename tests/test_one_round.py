"""Ranks with one root commit in one round; rank 0 deletes when the others have gone on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gpuckpt
from gpuckpt import layout
from gpuckpt.commit import open_step, steps
from gpuckpt.errors import RankError, StorageError
from gpuckpt.gathering import Decision, UnheardError, decided
from gpuckpt.groups import Group
from gpuckpt.groups.meeting import Meeting
from gpuckpt.stores.memory import MemoryStore
from tests.ranks import run_ranks
from tests.relay import GathersOnly, Relay, RelayGroup, values

LONG = 60.0


def saver(store: Any, group: Group, **options: Any) -> gpuckpt.Checkpointer:
    given: dict[str, Any] = {"memory": "64 MiB", "group_timeout": LONG, "codec": "raw"}
    return gpuckpt.Checkpointer("", store=store, group=group, **(given | options))


def state_at(step: int, rank: int) -> dict[str, Any]:
    own = gpuckpt.PerRank(np.full(4, rank, np.int64))
    return {"w": np.full(5000, step, np.float32), "own": own}


def failed(
    ckpt: gpuckpt.Checkpointer, pending: gpuckpt.Pending, kind: type[BaseException], said: str
) -> None:
    """See that a save failed in that way, so that the checkpointer can go on."""
    with pytest.raises(kind) as raised:
        pending.result(LONG)
    assert said in str(raised.value)
    with pytest.raises(kind):
        ckpt.wait()


def test_a_save_is_one_round():
    store, rounds = MemoryStore(), []

    def work(group: RelayGroup) -> None:
        with saver(store, group) as ckpt:
            for step in (1, 2, 3):
                ckpt.save(step, state_at(step, group.rank)).result(LONG)
                if group.rank == 0:
                    rounds.append(len(relay.gathers))

    relay = Relay(4)
    values(relay.run(work))
    assert relay.gathers[rounds[0] : rounds[2]] == ["the parts of step 2", "the parts of step 3"]
    assert steps(store) == [1, 2, 3]


@pytest.mark.parametrize("failing", [None, 0, 1])
def test_a_group_that_can_only_gather_needs_two_and_does_the_same(failing):
    store, rounds = MemoryStore(), []

    class Full(MemoryStore):
        def create(self, name: str) -> Any:
            if layout.data_step(name) == 2:
                raise StorageError("no room")
            return super().create(name)

    full = Full()
    full.files = store.files

    def work(meeting: Meeting) -> None:
        group = GathersOnly(meeting)
        with saver(full if group.rank == failing else store, group) as ckpt:
            for step in (1, 2, 3):
                pending = ckpt.save(step, state_at(step, group.rank))
                failure = StorageError if group.rank == failing else RankError
                if step == 2 and failing is not None:
                    failed(ckpt, pending, failure, "no room")
                else:
                    pending.result(LONG)
        rounds.append([what for what in group.rounds if "step 3" in what or "step 1" in what])

    run_ranks(3, work)
    assert steps(store) == ([1, 2, 3] if failing is None else [1, 3])
    if failing is None:
        parts = ["the parts of step 3", "the parts of step 3, as rank 0 decides"]
        assert all(one[-2:] == parts for one in rounds)
    assert {layout.data_step(name) for name in store.names()} - {None} == set(steps(store))


@pytest.mark.parametrize("dies", [1, 2])
def test_who_can_only_gather_deletes_nothing_once_rank_0_may_have_committed(dies):
    """Rank 0 has, between the two rounds."""
    store, ended = MemoryStore(), threading.Barrier(3)

    class Dying(GathersOnly):
        def all_gather(self, data: bytes, *, what: str, timeout: float) -> list[bytes]:
            if self.rank == dies and what == "the parts of step 2, as rank 0 decides":
                raise SystemExit
            return super().all_gather(data, what=what, timeout=timeout)

    def work(meeting: Meeting) -> None:
        with saver(store, Dying(meeting), group_timeout=1) as ckpt:
            ckpt.save(1, state_at(1, meeting.rank)).result(LONG)
            pending = ckpt.save(2, state_at(2, meeting.rank))
            if meeting.rank == 0:
                assert pending.result(LONG).step == 2
            else:
                kind = SystemExit if meeting.rank == dies else RankError
                failed(ckpt, pending, kind, "" if meeting.rank == dies else "may be there")
            ended.wait(LONG)

    run_ranks(3, work, grace=0.2)
    for rank in range(3):
        found = gpuckpt.load("", 2, store=store)
        np.testing.assert_array_equal(found["w"], state_at(2, rank)["w"])
    assert not set(open_step(store, 2).files) - set(store.names())


@pytest.mark.parametrize("wrap", [lambda group: group, GathersOnly])
def test_an_error_of_rank_0s_own_making_is_told_to_all_at_once(wrap):
    def work(meeting: Meeting) -> None:
        def choose(_: list[Any]) -> Any:
            raise MemoryError

        kind = MemoryError if meeting.rank == 0 else UnheardError
        with pytest.raises(kind):
            decided(wrap(meeting), "it", meeting.rank, choose, LONG)
        assert decided(wrap(meeting), "after", meeting.rank, sum, LONG) == Decision(3)

    run_ranks(3, work)


def test_every_rank_is_told_how_many_bytes_all_have_saved():
    store = MemoryStore()

    def work(group: Meeting) -> tuple[int, int]:
        with saver(store, group) as ckpt:
            done = ckpt.save(1, state_at(1, group.rank)).result(LONG)
        return done.raw_nbytes, done.encoded_nbytes

    told = run_ranks(3, work)
    found = open_step(store, parts=False)
    assert told == [(found.raw_nbytes, found.encoded_nbytes)] * 3


class Deleting(MemoryStore):
    """Its removals wait to be allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.allowed = threading.Event(), threading.Event()

    def remove(self, name: str) -> None:
        if layout.manifest_step(name) is not None:
            self.begun.set()
            assert self.allowed.wait(LONG)
        super().remove(name)


def test_others_write_their_next_step_while_rank_0_deletes_and_nothing_of_it_goes():
    store = Deleting()

    def work(group: Meeting) -> None:
        with saver(store, group, keep=gpuckpt.Keep(last=1)) as ckpt:
            ckpt.save(1, state_at(1, group.rank)).result(LONG)
            ckpt.save(2, state_at(2, group.rank)).result(LONG)
            if group.rank == 1:
                assert store.begun.wait(LONG)
                third = ckpt.save(3, state_at(3, group.rank))
                while not any(layout.data_step(name) == 3 for name in store.names()):
                    assert not third.committed.wait(0.01)
                store.allowed.set()
            else:
                ckpt.save(3, state_at(3, group.rank))

    run_ranks(3, work)
    assert steps(store) == [3]
    found = gpuckpt.load("", store=store)
    np.testing.assert_array_equal(found["w"], state_at(3, 0)["w"])
    assert set(store.names()) == {layout.manifest_name(3), *open_step(store, 3).files}


def test_a_rank_whose_time_is_over_deletes_nothing_that_rank_0_may_commit():
    store, late = MemoryStore(), threading.Event()

    class Slow(MemoryStore):
        def names(self) -> list[str]:
            if late.is_set():
                assert over.wait(LONG)
            return super().names()

    slow, over = Slow(), threading.Event()
    slow.files = store.files

    def work(group: Meeting) -> None:
        timeout = 1 if group.rank else LONG
        with saver(slow if group.rank == 0 else store, group, group_timeout=timeout) as ckpt:
            ckpt.save(1, state_at(1, group.rank)).result(LONG)
            if group.rank == 0:
                late.set()
            pending = ckpt.save(2, state_at(2, group.rank))
            if group.rank == 1:
                failed(ckpt, pending, RankError, "step 2 may be there all the same")
                over.set()
            elif group.rank == 0:
                pending.result(LONG)

    run_ranks(2, work, grace=0.2)
    assert steps(store) == [1, 2]
    np.testing.assert_array_equal(gpuckpt.load("", 2, store=store)["w"], state_at(2, 0)["w"])


def test_where_a_rank_is_missing_nothing_is_there_and_nothing_is_left():
    store, dead = MemoryStore(), threading.Barrier(3)

    def work(group: Meeting) -> None:
        with saver(store, group, group_timeout=1) as ckpt:
            ckpt.save(1, state_at(1, group.rank)).result(LONG)
            if group.rank != 2:
                pending = ckpt.save(2, state_at(2, group.rank))
                failed(ckpt, pending, RankError, "rank 2: not there")
                with pytest.raises(RankError) as raised:
                    pending.result(LONG)
                assert "may be there" not in str(raised.value)
            dead.wait(LONG)

    run_ranks(3, work, grace=0.2)
    assert set(store.names()) == {layout.manifest_name(1), *open_step(store, 1).files}


class Interrupted:
    """A group whose rank 0 is interrupted after it has decided, before the others hear."""

    def __init__(self, group: Meeting) -> None:
        self._group, self.rank, self.size = group, group.rank, group.size
        self.now = False
        self.all_gather, self.barrier = group.all_gather, group.barrier

    def decide(
        self, data: bytes, choose: Callable[[list[bytes]], bytes], *, what: str, timeout: float
    ) -> bytes:
        def chosen(told: list[bytes]) -> bytes:
            verdict = choose(told)
            if self.now:
                raise KeyboardInterrupt
            return verdict

        return self._group.decide(data, chosen, what=what, timeout=timeout)


def test_what_rank_0_has_committed_is_whole_though_nobody_heard_of_it():
    store = MemoryStore()

    def work(meeting: Meeting) -> None:
        group = Interrupted(meeting)
        with saver(store, group) as ckpt:
            ckpt.save(1, state_at(1, group.rank)).result(LONG)
            group.now = group.rank == 0
            pending = ckpt.save(2, state_at(2, group.rank))
            failed(ckpt, pending, KeyboardInterrupt if group.rank == 0 else RankError, "")
            group.now = False

    run_ranks(3, work, grace=0.2)
    assert steps(store) == [1, 2]
    np.testing.assert_array_equal(gpuckpt.load("", 2, store=store)["w"], state_at(2, 0)["w"])


def test_rank_0_knows_what_it_decided_though_it_cannot_know_that_all_hear():
    def work(group: RelayGroup) -> object:
        try:
            return decided(group, "it", group.rank, sum, LONG)
        except UnheardError:
            return "unheard"

    found = values(Relay(3, lambda *_: (0, 2)).run(work))
    assert found == [Decision(3, is_heard=False), Decision(3), "unheard"]


def test_an_error_of_any_rank_is_told_to_all_and_nothing_is_decided():
    def work(group: RelayGroup) -> object:
        answer: Any = ValueError("no") if group.rank == 1 else group.rank
        with pytest.raises(ValueError if group.rank == 1 else RankError, match="no") as raised:
            decided(group, "it", answer, lambda _: pytest.fail("decided"), LONG)
        return getattr(raised.value, "ranks", None)

    assert values(Relay(3).run(work)) == [(1,), None, (1,)]
