"""A rank other than 0 in the rounds of a group."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import NamedTuple

from gpuckpt.errors import RankError
from gpuckpt.groups.board import Board
from gpuckpt.groups.letters import Answer, Failure, Gone, Message, pack_letter, unpack_answer
from gpuckpt.groups.roll import Keys, enter

# Of a time-out: whoever waits long may wait a little longer.
_SHARE = 0.1


class Grace(NamedTuple):
    """How long rank 0, if it is there, may take to see that a rank's time is over."""

    seconds: float = 5.0

    def of(self, timeout: float) -> float:
        """Seconds after a time-out."""
        return self.seconds + _SHARE * timeout

    @property
    def piece(self) -> float:
        """Seconds of one wait: all are cut in pieces, so that Ctrl-C, too, comes through."""
        return self.seconds / 5


class Follower:
    """Puts messages up, numbered from 1, and reads every answer, in order."""

    def __init__(self, board: Board, rank: int, run: str, grace: Grace) -> None:
        self._board, self._rank, self._run, self._grace = board, rank, run, grace
        self._keys: Keys | None = None
        self._number = self._seen = 0
        # What failed without this rank, which hasn't come to it yet.
        self._failed: dict[str, RankError] = {}
        self._left: list[str] = []

    def gather(self, data: bytes, what: str, timeout: float) -> list[bytes]:
        """What every rank gave."""
        return list(self._round(data, what, timeout))

    def decide(
        self, data: bytes, choose: Callable[[list[bytes]], bytes], what: str, timeout: float
    ) -> bytes:
        """What rank 0 chose."""
        del choose  # rank 0's is called
        return self._round(data, what, timeout)[0]

    def _round(self, data: bytes, what: str, timeout: float) -> tuple[bytes, ...]:
        """What rank 0 answers."""
        if what in self._failed:
            raise self._failed.pop(what)
        end = time.monotonic() + timeout
        if self._keys is None:
            session = enter(self._board, self._run, self._rank, timeout + self._grace.of(timeout))
            if session is None:
                raise _no_answer(what, timeout + self._grace.of(timeout))
            self._keys = Keys(self._run, session)
        outcome = self._take_part(self._keys, Message(what, self._seen, data), timeout, end)
        if outcome is None:
            raise _no_answer(what, timeout + self._grace.of(timeout))
        if isinstance(outcome, Failure):
            raise outcome.error()
        return outcome

    def _take_part(
        self, keys: Keys, message: Message, timeout: float, end: float
    ) -> tuple[bytes, ...] | Failure | None:
        """Put a message up, and wait; if that ends without an answer, say so in its place."""
        reason = f"gave up waiting for {message.what!r} after {timeout:g} s"
        outcome = None
        try:
            self._number += 1
            self._left.append(keys.message(self._rank, self._number))
            self._board.put(self._left[-1], pack_letter(message))
            outcome = self._outcome(keys, message.what, timeout, end)
        except BaseException as error:
            reason = f"was interrupted at {message.what!r}: {error!r}"
            raise
        finally:
            if outcome is None:
                with contextlib.suppress(Exception):
                    key = keys.message(self._rank, self._number)
                    self._board.put(key, pack_letter(Gone(reason)))
        return outcome

    def _outcome(
        self, keys: Keys, what: str, timeout: float, end: float
    ) -> tuple[bytes, ...] | Failure | None:
        """How the round ended; None if rank 0 didn't say in time."""
        over = -1
        last = end + self._grace.of(timeout)
        while (now := time.monotonic()) < last:
            if now >= end and over != self._seen:
                over = self._seen
                note = {"what": what, "rank": self._rank, "timeout": timeout}
                self._board.put(keys.over(self._seen + 1), json.dumps(note).encode())
            until = end if now < end else last
            wait = min(max(until - now, 0.0), self._grace.piece)
            found = self._board.wait(keys.answer(self._seen + 1), wait)
            if found is not None:
                self._seen += 1
                outcome = self._read(_answer(found), what)
                if outcome is not None:
                    return outcome
        return None

    def _read(self, answer: Answer, what: str) -> tuple[bytes, ...] | Failure | None:
        """How the round of this rank's message ended, if this answer says so."""
        outcome, mine = answer.outcome, answer.taken[self._rank] == self._number
        if isinstance(outcome, Failure):
            others = (one for one in outcome.whats if one != what)
            self._failed |= {one: outcome.error() for one in others}
        else:
            # All ranks were at the same then, so that nothing of before matters.
            self._failed.clear()
        if mine:
            self._clear()
            return outcome
        return outcome if isinstance(outcome, Failure) and what in outcome.whats else None

    def _clear(self) -> None:
        """Rank 0 has read these, or passed them over."""
        for key in self._left:
            self._board.remove(key)
        self._left.clear()


def _answer(data: bytes) -> Answer:
    try:
        return unpack_answer(data)
    except ValueError as error:
        raise RankError(
            [0], f"its answer can't be read ({error}); do all run one gpuckpt?"
        ) from error


def _no_answer(what: str, seconds: float) -> RankError:
    return RankError(
        [0],
        f"not there after {seconds:g} s, for {what!r}; see whether it has ended, "
        "hangs, or needs a longer time-out (a process that is the only one: group=gpuckpt.Alone())",
    )
