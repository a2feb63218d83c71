"""Ranks that meet: each has what all gave, a round has one outcome, who is missing is named."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections import Counter
from types import SimpleNamespace
from typing import cast
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuckpt.errors import ClosedError, InvalidError, RankError
from gpuckpt.groups import Alone, Group, UndecidedError
from gpuckpt.groups.board import Patience
from gpuckpt.groups.leader import Leader
from gpuckpt.groups.letters import (
    Answer,
    Failure,
    Gone,
    Message,
    pack_answer,
    pack_letter,
    unpack_answer,
    unpack_letter,
)
from gpuckpt.groups.meeting import Meeting
from gpuckpt.groups.threads import MemoryBoard
from tests.ranks import run_ranks

LONG, SHORT, GRACE = 60.0, 0.3, 0.5

COUNTS = st.integers(0, 2**40)
OUTCOMES = st.lists(st.binary(max_size=9), min_size=1, max_size=9).map(tuple) | st.builds(
    Failure,
    st.lists(COUNTS, max_size=5).map(tuple),
    st.text(),
    st.lists(st.text(), min_size=1, max_size=3).map(tuple),
    st.booleans(),
)


def attempt(group: Group, what: str, timeout: float = LONG, data: bytes = b"") -> object:
    """What a rank gets of a round: the values, or whom an error names."""
    try:
        return group.all_gather(data, what=what, timeout=timeout)
    except RankError as error:
        return error.ranks


def test_every_rank_gets_what_all_gave():
    def work(group: Meeting) -> list[list[bytes]]:
        return [
            group.all_gather(bytes([group.rank]) * group.rank, what=f"round {at}", timeout=LONG)
            for at in range(5)
        ]

    for found in run_ranks(4, work):
        assert found == [[b"", b"\1", b"\2\2", b"\3\3\3"]] * 5


def test_a_group_of_one_waits_for_nobody():
    for group in (Alone(), Meeting(MemoryBoard(), 0, 1)):
        assert group.all_gather(b"x", what="it", timeout=SHORT) == [b"x"]
        group.barrier(what="it", timeout=SHORT)


def test_payloads_of_half_a_megabyte_come_through():
    given = [os.urandom(500_000) for _ in range(3)]
    found = run_ranks(3, lambda g: g.all_gather(given[g.rank], what="layout", timeout=LONG))
    assert found == [given] * 3


def test_a_rank_that_does_not_come_is_named_to_all_and_the_next_round_works():
    given_up = threading.Barrier(3)

    def work(group: Meeting) -> object:
        if group.rank != 2:
            with pytest.raises(RankError, match=r"rank 2: not there .*'commit 1'") as raised:
                group.barrier(what="commit 1", timeout=SHORT)
            assert raised.value.ranks == (2,)
        given_up.wait(LONG)
        return attempt(group, "commit 2", data=b"x")

    assert run_ranks(3, work, grace=GRACE) == [[b"x"] * 3] * 3


def test_only_who_is_missing_is_named_when_ranks_have_never_met():
    def work(group: Meeting) -> object:
        return None if group.rank == 1 else attempt(group, "it", 2 * SHORT)

    assert run_ranks(4, work, grace=GRACE) == [(1,), None, (1,), (1,)]


def test_a_missing_rank_0_is_named_and_the_next_round_works():
    given_up = threading.Barrier(3)

    def work(group: Meeting) -> object:
        if group.rank != 0:
            assert attempt(group, "one", SHORT) == (0,)
        given_up.wait(LONG)
        return attempt(group, "two", data=b"x")

    assert run_ranks(3, work, grace=GRACE) == [[b"x"] * 3] * 3


def test_a_rank_that_comes_late_is_told_at_once_that_all_have_given_up():
    failed = threading.Event()

    def work(group: Meeting) -> object:
        attempt(group, "together")
        if group.rank == 1:
            failed.wait(LONG)
        found = attempt(group, "late", LONG if group.rank == 1 else SHORT)
        failed.set()
        return found, attempt(group, "after", data=b"x")

    assert run_ranks(3, work, grace=GRACE) == [((1,), [b"x"] * 3)] * 3


def test_all_learn_who_is_missing_when_the_first_ranks_time_is_over():
    def work(group: Meeting) -> str:
        attempt(group, "together")
        if group.rank == 2:
            return ""
        with pytest.raises(RankError) as raised:
            group.barrier(what="it", timeout=LONG if group.rank == 0 else SHORT)
        return str(raised.value)

    found = run_ranks(3, work, grace=GRACE)
    assert found[0] == found[1]
    assert found[0].startswith("rank 2: not there when the 0.3 s of rank 1 were over, for 'it'; ")


@pytest.mark.parametrize("odd", [0, 1, 3])
def test_a_rank_at_something_else_is_named_with_both_texts_to_all(odd):
    def work(group: Meeting) -> object:
        what = "parts of step 301" if group.rank == odd else "parts of step 300"
        with pytest.raises(RankError) as raised:
            group.barrier(what=what, timeout=LONG)
        assert raised.value.ranks == (odd,)
        assert "at 'parts of step 301', the others at 'parts of step 300'" in str(raised.value)
        return attempt(group, "parts of step 400", data=b"x")

    assert run_ranks(4, work) == [[b"x"] * 4] * 4


def test_nobody_is_waited_for_once_two_ranks_are_at_different_things():
    def work(group: Meeting) -> object:
        attempt(group, "together")
        return None if group.rank == 2 else attempt(group, f"at {group.rank}", 4 * SHORT)

    assert run_ranks(3, work, grace=GRACE) == [(1,), (1,), None]


@pytest.mark.parametrize("odd", [0, 1])
def test_a_rank_that_left_a_save_between_two_gathers_is_together_with_the_others_again(odd):
    rounds = [f"{part} of step {step}" for step in (1, 2, 3) for part in ("parts", "commit")]

    def work(group: Meeting) -> list[object]:
        mine = [what for what in rounds if group.rank != odd or what != "commit of step 1"]
        found: list[object] = []
        for step in ("1", "2", "3"):
            for what in (what for what in mine if what.endswith(step)):
                found.append(attempt(group, what, data=what.encode()))
                if isinstance(found[-1], tuple):
                    break  # the save has failed
        return found

    for rank, found in enumerate(run_ranks(3, work)):
        failures = [(odd,)] * (1 if rank == odd else 2)
        assert found == [
            [b"parts of step 1"] * 3,
            *failures,
            [b"parts of step 3"] * 3,
            [b"commit of step 3"] * 3,
        ]


def test_a_round_that_failed_can_be_tried_again_under_its_name():
    def work(group: Meeting) -> object:
        if group.rank != 2:
            assert attempt(group, "it", SHORT, data=b"first") == (2,)
        else:
            time.sleep(2 * SHORT)
            assert attempt(group, "it", data=b"first") == (2,)
        return attempt(group, "it", data=b"again")

    assert run_ranks(3, work, grace=GRACE) == [[b"again"] * 3] * 3


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_whatever_rounds_ranks_leave_out_no_two_are_mixed_up_and_they_meet_again(data):
    size, rounds = data.draw(st.integers(2, 4)), [f"round {at}" for at in range(6)]
    left_out = st.sets(st.sampled_from(rounds))
    mine = [sorted(set(rounds) - data.draw(left_out)) for _ in range(size)]
    # After as many more as they were apart, all have met.
    more = [f"then {at}" for at in range(2 * len(rounds) + 2)]

    def work(group: Meeting) -> dict[str, object]:
        return {
            what: attempt(group, what, data=what.encode() + b"%d" % group.rank)
            for what in [*mine[group.rank], *more]
        }

    found = run_ranks(size, work, grace=GRACE / 10)
    for what in [*rounds, *more]:
        outcomes = [one[what] for one in found if what in one]
        if any(isinstance(one, list) for one in outcomes):
            assert outcomes == [[what.encode() + b"%d" % rank for rank in range(size)]] * size
    assert isinstance(found[0][more[-1]], list)


def test_what_a_dead_run_left_is_not_taken_for_this_one():
    board = MemoryBoard()

    def dies(group: Meeting) -> None:
        attempt(group, "parts", data=b"dead")
        if group.rank == 1:
            return
        board.put("gpuckpt/hello-1", b"a stale word")
        board.put("gpuckpt/welcome", json.dumps({"session": "dead", "words": {}}).encode())

    run_ranks(2, dies, board=board)
    found = run_ranks(
        2, lambda group: attempt(group, "parts", data=b"live"), board=board, grace=GRACE
    )
    assert found == [[b"live"] * 2] * 2


def test_a_good_run_leaves_nothing_but_its_last_answer():
    board = MemoryBoard()

    def work(group: Meeting) -> None:
        for at in range(10):
            group.barrier(what=f"round {at}", timeout=LONG)

    run_ranks(3, work, board=board)
    assert [key.split("/")[-1] for key in board._values] == ["answer-10"]


class Slow(MemoryBoard):
    """The others see rank 0's answer only once it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = threading.Event()

    def wait(self, key: str, timeout: float) -> bytes | None:
        if "answer" in key:
            self.shown.wait(LONG)
        return super().wait(key, timeout)


def test_closing_waits_until_all_have_the_last_answer():
    board = Slow()

    def work(group: Meeting) -> list[str]:
        group.barrier(what="it", timeout=LONG)
        if group.rank == 0:
            threading.Timer(SHORT, board.shown.set).start()
            group.close(LONG)
        return [key for key in board._values if "message" in key]

    assert run_ranks(3, work, board=board)[0] == []


def test_who_waits_long_for_one_value_looks_less_and_less_often():
    clock = SimpleNamespace(now=0.0)
    looks: list[float] = []

    def pass_by(seconds: float) -> None:
        clock.now += seconds

    patience = Patience(0.001, 1.0)
    with mock.patch(
        "gpuckpt.groups.board.time", SimpleNamespace(monotonic=lambda: clock.now, sleep=pass_by)
    ):
        for timeout in (1, 1, 30):
            patience.wait("a", timeout, lambda: looks.append(clock.now))
        again = len(looks)
        patience.wait("b", 1, lambda: looks.append(clock.now))
    pauses = [after - before for before, after in itertools.pairwise(looks) if after > before]
    assert min(pauses[: again - 3]) == pytest.approx(0.001)
    assert max(pauses) == pytest.approx(1.0)
    assert again - 3 < len(looks) - again + 60
    assert sum(1 < at <= 2 for at in looks[:again]) < 20


class Counting(MemoryBoard):
    """Counts what rank 0 asks for, whose messages are all there."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def put(self, key: str, value: bytes) -> None:
        self.counts["put"] += 1
        super().put(key, value)

    def wait(self, key: str, timeout: float) -> bytes | None:
        self.counts["wait"] += 1
        return super().wait(key, timeout)

    def remove(self, key: str) -> None:
        self.counts["remove"] += 1
        super().remove(key)


@pytest.mark.parametrize("size", [2, 256, 16_384])
def test_a_round_costs_rank_0_a_put_and_a_wait_for_each_of_the_others(size):
    board = Counting()
    group = Meeting(board, 0, size)
    keys = cast(Leader, group._member)._keys
    for number in (1, 2, 3):
        for rank in range(1, size):
            letter = pack_letter(Message(f"{number}", number - 1, b""))
            board._values |= {f"gpuckpt/hello-{rank}": b"word", keys.message(rank, number): letter}
        board.counts.clear()
        group.barrier(what=f"{number}", timeout=LONG)
        first = number == 1
        waits = (2 if first else 1) * (size - 1)
        assert board.counts == {"put": 2 if first else 1, "wait": waits, "remove": 1}


class Interrupting(MemoryBoard):
    """Ctrl-C comes at the next wait for, or put of, a key of some end."""

    def __init__(self) -> None:
        super().__init__()
        self.wait_at = self.put_at = ""

    def wait(self, key: str, timeout: float) -> bytes | None:
        if self.wait_at and key.endswith(self.wait_at):
            self.wait_at = ""
            raise KeyboardInterrupt
        return super().wait(key, timeout)

    def put(self, key: str, value: bytes) -> None:
        if self.put_at and key.endswith(self.put_at):
            self.put_at = ""
            raise KeyboardInterrupt
        super().put(key, value)


@pytest.mark.parametrize(
    ("rank", "wait_at", "put_at"),
    [(0, "message-1-2", ""), (0, "", "answer-2"), (1, "answer-2", ""), (1, "", "message-1-2")],
)
def test_a_rank_that_is_interrupted_is_named_to_all_and_the_next_round_works(rank, wait_at, put_at):
    board, left = Interrupting(), threading.Barrier(3)

    def work(group: Meeting) -> object:
        attempt(group, "together")
        left.wait(LONG)
        if group.rank == rank:
            board.wait_at, board.put_at = wait_at, put_at
            with pytest.raises(KeyboardInterrupt):
                group.barrier(what="it", timeout=LONG)
        if rank == 1:
            left.wait(LONG)  # else rank 0 may have had what rank 1 gave before
        if group.rank != rank:
            said = r"was interrupted at 'it'" if rank == 1 or wait_at else "not there after"
            with pytest.raises(RankError, match=f"rank {rank}: {said}") as raised:
                group.barrier(what="it", timeout=SHORT)
            assert raised.value.ranks == (rank,)
        left.wait(LONG)
        return attempt(group, "after", data=b"x")

    assert run_ranks(3, work, board=board, grace=GRACE) == [[b"x"] * 3] * 3


class Lost(MemoryBoard):
    """The process where the values are has ended."""

    def wait(self, key: str, timeout: float) -> bytes | None:
        raise ConnectionError(f"{key}: reset by peer")


def test_a_board_that_cannot_be_reached_names_rank_0():
    with pytest.raises(RankError, match=r"rank 0: the place where ranks meet.*'it'.*reset by peer"):
        Meeting(Lost(), 1, 2).barrier(what="it", timeout=LONG)


def test_all_get_what_rank_0_alone_decides_from_what_all_gave():
    calls: list[tuple[int, list[bytes]]] = []

    def work(group: Meeting) -> list[bytes]:
        def choose(told: list[bytes]) -> bytes:
            calls.append((group.rank, told))
            return b"%d of %d" % (len(calls), sum(map(len, told)))

        own = bytes(group.rank)
        rounds = [group.decide(own, choose, what=f"{at}", timeout=LONG) for at in (1, 2)]
        return [*rounds, *group.all_gather(own, what="after", timeout=LONG)]

    all_gave = [b"", b"\0", b"\0\0"]
    assert run_ranks(3, work) == [[b"1 of 3", b"2 of 3", *all_gave]] * 3
    assert calls == [(0, all_gave)] * 2


def test_a_rank_alone_decides_by_itself():
    for group in (Alone(), Meeting(MemoryBoard(), 0, 1)):
        found = group.decide(b"x", lambda told: told[0] * 2, what="it", timeout=SHORT)
        assert found == b"xx"


def test_nothing_is_decided_while_a_rank_is_missing_and_the_next_round_works():
    given_up = threading.Barrier(3)

    def work(group: Meeting) -> object:
        if group.rank != 1:
            with pytest.raises(UndecidedError) as raised:
                group.decide(b"", lambda _: pytest.fail("decided"), what="it", timeout=SHORT)
            assert raised.value.ranks == (1,)
        given_up.wait(LONG)
        if group.rank == 1:
            with pytest.raises(RankError):
                group.decide(b"", lambda _: b"", what="it", timeout=LONG)
        return group.decide(b"x", b"".join, what="after", timeout=LONG)

    assert run_ranks(3, work, grace=GRACE) == [b"xxx"] * 3


def test_rank_0_takes_nothing_of_who_has_heard_that_a_round_failed():
    """Though the board goes while rank 0 says so: what is late for it stays late."""

    class Breaking(MemoryBoard):
        broken = False

        def remove(self, key: str) -> None:
            if self.broken and "over" in key:
                raise ConnectionError("reset by peer")
            super().remove(key)

    board, met = Breaking(), threading.Barrier(2)

    def work(group: Meeting) -> object:
        group.barrier(what="together", timeout=LONG)
        if group.rank == 0:
            board.broken = True
            with pytest.raises(RankError):
                group.decide(b"", lambda _: b"", what="it", timeout=SHORT)
            board.broken = False
        met.wait(LONG)
        if group.rank == 1:
            with pytest.raises(UndecidedError):
                group.decide(b"late", lambda _: b"", what="it", timeout=LONG)
        return group.decide(b"x", b"".join, what="it", timeout=LONG)

    assert run_ranks(2, work, board=board, grace=GRACE) == [b"xx"] * 2


def test_a_rank_0_that_is_interrupted_while_it_decides_is_named_and_the_next_round_works():
    def work(group: Meeting) -> object:
        def choose(_: list[bytes]) -> bytes:
            raise KeyboardInterrupt

        kind = KeyboardInterrupt if group.rank == 0 else RankError
        with pytest.raises(
            kind, match=None if group.rank == 0 else "rank 0: was interrupted"
        ) as raised:
            group.decide(b"", choose, what="it", timeout=LONG)
        # It may have done what it was to, so nobody is told that it hasn't.
        assert not isinstance(raised.value, UndecidedError)
        return group.decide(b"x", b"".join, what="after", timeout=LONG)

    assert run_ranks(3, work, grace=GRACE) == [b"xxx"] * 3


def test_what_rank_0_decides_is_all_that_the_others_are_told():
    lengths = []

    class Noting(MemoryBoard):
        def put(self, key: str, value: bytes) -> None:
            if "answer" in key:
                lengths.append(len(value))
            super().put(key, value)

    def work(group: Meeting) -> None:
        group.decide(bytes(100_000), lambda _: b"yes", what="it", timeout=LONG)

    run_ranks(4, work, board=Noting())
    assert max(lengths) < 200


def test_what_cannot_be_read_names_who_gave_it():
    board = MemoryBoard()

    def work(group: Meeting) -> None:
        attempt(group, "together")
        if group.rank == 1:
            (session,) = {key.split("/")[1] for key in board._values if "answer" in key}
            board.put(f"gpuckpt/{session}/message-1-2", b"\0\0\0\0garbage")
            return
        with pytest.raises(RankError, match=r"rank 1: what it gave can't be read"):
            group.barrier(what="it", timeout=LONG)

    run_ranks(2, work, board=board)


def test_a_forked_child_is_no_rank():
    group = Meeting(MemoryBoard(), 0, 1)
    group._process += 1
    with pytest.raises(ClosedError, match=r"rank 0: 'it' in a process forked"):
        group.barrier(what="it", timeout=LONG)


def test_two_threads_cannot_meet_the_ranks_at_once():
    def work(group: Meeting) -> None:
        if group.rank == 1:
            return
        entered = threading.Thread(target=lambda: attempt(group, "it", SHORT))
        entered.start()
        while not group._turn.locked():
            time.sleep(0.01)
        with pytest.raises(InvalidError, match=r"rank 0: 'other' while another thread"):
            group.barrier(what="other", timeout=SHORT)
        entered.join()

    run_ranks(2, work, grace=GRACE)


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_ranks_that_cannot_be_are_refused(rank, size):
    with pytest.raises(InvalidError, match="ranks are from 0"):
        Meeting(MemoryBoard(), rank, size)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_time_out_is_above_zero(timeout):
    with pytest.raises(InvalidError, match="time-out"):
        Meeting(MemoryBoard(), 0, 2).barrier(what="it", timeout=timeout)


@settings(deadline=None)
@given(st.builds(Message, st.text(), COUNTS, st.binary()) | st.builds(Gone, st.text()))
def test_unpacking_a_letter_undoes_packing_it(letter):
    assert unpack_letter(pack_letter(letter)) == letter


@settings(deadline=None)
@given(OUTCOMES, st.data())
def test_unpacking_an_answer_undoes_packing_it(outcome, data):
    alone = isinstance(outcome, Failure) or len(outcome) == 1
    size = data.draw(st.integers(1, 9)) if alone else len(outcome)
    taken = tuple(data.draw(st.lists(COUNTS, min_size=size, max_size=size)))
    answer = Answer(taken, outcome)
    assert unpack_answer(pack_answer(answer)) == answer


@settings(deadline=None)
@given(st.binary() | st.binary().map(lambda data: b"\2\0\0\0{}" + data))
def test_bytes_that_are_none_are_no_letter_and_no_answer(data):
    for unpack in (unpack_letter, unpack_answer):
        with pytest.raises(ValueError):
            unpack(data)


def test_a_barriers_answer_is_short_for_any_number_of_ranks():
    assert len(pack_answer(Answer((0, *[7] * 16_383), (b"",) * 16_384))) < 100
