"""Ranks that meet: each has what all gave, and who is missing is named."""

from __future__ import annotations

import pytest

from gpuckpt.errors import RankError
from gpuckpt.groups.meeting import Meeting
from tests.ranks import run_ranks


def test_every_rank_gets_what_all_gave():
    def work(group: Meeting) -> list[list[bytes]]:
        return [
            group.all_gather(bytes([group.rank]) * group.rank, what="a test", timeout=10)
            for _ in range(5)
        ]

    for found in run_ranks(4, work):
        assert found == [[b"", b"\1", b"\2\2", b"\3\3\3"]] * 5


def test_a_rank_that_does_not_come_is_named_to_all_and_the_next_round_works():
    def work(group: Meeting) -> list[bytes]:
        if group.rank != 2:
            with pytest.raises(RankError, match="rank 2: not there") as raised:
                group.all_gather(b"", what="a test", timeout=0.2)
            assert raised.value.ranks == (2,)
        else:
            group._round += 1  # it was elsewhere
        return group.all_gather(b"x", what="a test", timeout=10)

    assert run_ranks(3, work) == [[b"x"] * 3] * 3
