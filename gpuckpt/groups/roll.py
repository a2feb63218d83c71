"""How ranks find each other on a board where dead runs may have left things.

Each rank but 0 puts up a *hello* with a word that it has just made up.  Rank 0
names its session, and all words that it has seen, in a *welcome*.  A rank that
finds its own word there takes part in the run; so no rank follows a welcome
of a dead run.  A hello of a dead run is replaced when the rank comes, and rank 0
looks for that while it has not heard of the rank in the run.
"""

from __future__ import annotations

import json
import secrets
import time
from typing import NamedTuple

from gpuckpt.groups.board import Board

# Between two looks of a rank for its welcome.
_SHORTEST, _LONGEST = 0.005, 0.5


class Keys(NamedTuple):
    """The names of one session's values."""

    run: str
    session: str

    def message(self, rank: int, number: int) -> str:
        """What a rank gives for its round of that number, counted from 1."""
        return f"{self.run}/{self.session}/message-{rank}-{number}"

    def answer(self, number: int) -> str:
        """Rank 0's answer of that number, counted from 1."""
        return f"{self.run}/{self.session}/answer-{number}"

    def over(self, number: int) -> str:
        """Says that a rank's time is over before rank 0's answer of that number."""
        return f"{self.run}/{self.session}/over-{number}"


def hello(run: str, rank: int) -> str:
    """The name of a rank's hello."""
    return f"{run}/hello-{rank}"


def welcome(run: str) -> str:
    """The name of the welcome."""
    return f"{run}/welcome"


class Roll:
    """Which ranks have come, as rank 0 knows it."""

    def __init__(self, board: Board, keys: Keys, size: int) -> None:
        self._board, self._keys = board, keys
        self._words: dict[int, str] = {}
        self._unheard = set(range(1, size))
        self._welcomed = True

    def missing(self) -> list[int]:
        """The ranks that haven't come."""
        return sorted(self._unheard - self._words.keys())

    def look(self, rank: int, timeout: float) -> bool:
        """Whether a rank's hello is there, waited for."""
        if rank not in self._unheard:
            return True
        word = self._board.wait(hello(self._keys.run, rank), timeout)
        if word is not None and word.decode("ascii", "replace") != self._words.get(rank):
            self._words[rank] = word.decode("ascii", "replace")
            self._welcomed = False
        return word is not None

    def heard(self, rank: int) -> None:
        """A rank has taken part in the run."""
        self._unheard.discard(rank)

    def welcome(self) -> None:
        """Name all that have come, if some weren't named yet."""
        if not self._welcomed:
            note = {"session": self._keys.session, "words": self._words}
            self._board.put(welcome(self._keys.run), json.dumps(note).encode())
            self._welcomed = True

    def close(self) -> None:
        """All have been heard of."""
        self._board.remove(welcome(self._keys.run))
        self._board.sweep(self._keys.run, self._keys.session)


def enter(board: Board, run: str, rank: int, timeout: float) -> str | None:
    """The session in which this rank is welcome; None if there is none in time."""
    start, word = time.monotonic(), secrets.token_hex(4)
    board.put(hello(run, rank), word.encode())
    try:
        while (left := start + timeout - time.monotonic()) > 0:
            note = board.wait(welcome(run), min(left, 1.0))
            if note is not None and (session := _session(note, rank, word)):
                return session
            passed = time.monotonic() - start
            if note is not None:
                time.sleep(min(max(passed / 10, _SHORTEST), _LONGEST, max(left, 0.0)))
        return None
    finally:
        board.remove(hello(run, rank))


def _session(note: bytes, rank: int, word: str) -> str | None:
    """The session of a welcome, if it is for who said that word."""
    try:
        found = json.loads(note)
        return str(found["session"]) if found["words"].get(str(rank)) == word else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
