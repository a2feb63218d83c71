"""Ranks that meet on a board: a place where each can put a value that all can read.

Every rank puts its value there; rank 0 takes them all, and puts up what all
shall have, or who was missing.  So a gather costs each rank one put and one
wait, rank 0 one wait for each of the others, and whoever is missing has a name.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from typing import Protocol

from gpuckpt.errors import RankError

_LENGTH = struct.Struct("<Q")
_GOOD, _BAD = b"+", b"-"
# Rank 0 has given up by then, and said so.
_GRACE_SECONDS = 5.0


class Board(Protocol):
    """Values under names, each put there once, by any rank."""

    def put(self, key: str, value: bytes) -> None:
        """Put a value there."""
        ...

    def wait(self, key: str, timeout: float) -> bytes | None:
        """The value, once it is there; None if it isn't after `timeout` seconds."""
        ...

    def remove(self, key: str) -> None:
        """Take a value away, if it is there."""
        ...


class Meeting:
    """A `Group` whose ranks meet on a board.

    A round that failed can be followed by others, as long as every rank takes
    part in the same ones: those that came late find it failed, too.
    """

    def __init__(self, board: Board, rank: int, size: int, name: str = "gpuckpt") -> None:
        """`name` tells this group's values from those of others on the same board."""
        self.rank, self.size = rank, size
        self._board, self._name = board, name
        self._round = 0

    def all_gather(self, data: bytes, *, what: str, timeout: float) -> list[bytes]:
        """What every rank gave, by rank."""
        self._round += 1
        if self.rank == 0:
            return self._lead(data, what, timeout)
        self._board.put(self._key(self.rank), data)
        answer = self._board.wait(self._key(0), timeout + _GRACE_SECONDS)
        if answer is None:
            raise RankError([0], f"not there after {timeout + _GRACE_SECONDS:g} s, for {what!r}")
        return _unpacked(answer)

    def barrier(self, *, what: str, timeout: float) -> None:
        """Wait until every rank has come here."""
        self.all_gather(b"", what=what, timeout=timeout)

    def _lead(self, data: bytes, what: str, timeout: float) -> list[bytes]:
        end = time.monotonic() + timeout
        found: list[bytes | None] = [data]
        found += [
            self._board.wait(self._key(rank), max(end - time.monotonic(), 0.0))
            for rank in range(1, self.size)
        ]
        missing = [rank for rank, value in enumerate(found) if value is None]
        reason = f"not there after {timeout:g} s, for {what!r}"
        answer = _bad(missing, reason) if missing else _good([one or b"" for one in found])
        self._board.put(self._key(0), answer)
        self._tidy()
        return _unpacked(answer)

    def _tidy(self) -> None:
        """All ranks have read what was put there two rounds ago, or have given it up."""
        for rank in range(self.size) if self._round > 2 else ():
            self._board.remove(self._key(rank, self._round - 2))

    def _key(self, rank: int, round_: int | None = None) -> str:
        return f"{self._name}/{self._round if round_ is None else round_}/{rank}"


def _good(values: Sequence[bytes]) -> bytes:
    return _GOOD + b"".join(_LENGTH.pack(len(value)) + value for value in values)


def _bad(ranks: Sequence[int], reason: str) -> bytes:
    return _BAD + ",".join(map(str, ranks)).encode() + b":" + reason.encode()


def _unpacked(answer: bytes) -> list[bytes]:
    """What all gave: the inverse of `_good`; raises what `_bad` says."""
    if answer[:1] == _BAD:
        ranks, _, reason = answer[1:].decode().partition(":")
        raise RankError([int(rank) for rank in ranks.split(",")], reason)
    values, at = [], 1
    while at < len(answer):
        (length,) = _LENGTH.unpack_from(answer, at)
        at += _LENGTH.size
        values.append(answer[at : at + length])
        at += length
    return values
