"""The port to a place where ranks leave values for each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from gpuckpt.errors import ClosedError

# So much later than it could have, at most, does a rank see what it waits for.
_SHARE = 0.1


class Board(Protocol):
    """Values under names, which every rank can put there and see.

    Names are of lower-case letters, digits, `-` and `/`.  One thread of each
    rank calls at a time.  Only rank 0 reads what others put there, and the
    others only what rank 0 did.  Every method raises `ConnectionError` if the
    place can't be reached any more.
    """

    def put(self, key: str, value: bytes) -> None:
        """Put a value there, in the place of any that is."""
        ...

    def wait(self, key: str, timeout: float) -> bytes | None:
        """The value, once it is there; None if it isn't after `timeout` seconds.

        Looks once if `timeout` is 0.
        """
        ...

    def remove(self, key: str) -> None:
        """Take a value away, if it is there."""
        ...

    def sweep(self, run: str, session: str) -> None:
        """Take away what earlier runs left, if the board outlives runs.

        Live is what is below `run/session/`; the rest below `run/` is left
        over.  What is below other names may be live.
        """
        ...


class Leavable:
    """A board whose waits end when somebody wants to leave."""

    def __init__(self, board: Board) -> None:
        """Has what `board` has."""
        self._board = board
        self.is_left = False
        """Whether waits fail; any thread may say so."""

    def put(self, key: str, value: bytes) -> None:
        """Put a value there."""
        self._board.put(key, value)

    def wait(self, key: str, timeout: float) -> bytes | None:
        """The value, once it is there; `ClosedError` instead of a wait if nobody wants to."""
        if self.is_left and timeout > 0:
            raise ClosedError("nobody waits for the other ranks any more: it was interrupted")
        return self._board.wait(key, timeout)

    def remove(self, key: str) -> None:
        """Take a value away."""
        self._board.remove(key)

    def sweep(self, run: str, session: str) -> None:
        """Take away what earlier runs left."""
        self._board.sweep(run, session)


class Patience:
    """Looks again and again, less and less often, for one key at a time."""

    def __init__(self, shortest: float, longest: float) -> None:
        """`shortest` and `longest` are seconds between two looks."""
        self._shortest, self._longest = shortest, longest
        self._key, self._since = "", 0.0

    def wait(self, key: str, timeout: float, look: Callable[[], bytes | None]) -> bytes | None:
        """What `look` finds; None if that is nothing for `timeout` seconds.

        Whoever goes on waiting for the same key isn't more impatient than before.
        """
        end = time.monotonic() + timeout
        if timeout and key != self._key:
            self._key, self._since = key, time.monotonic()
        while (found := look()) is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, self._delay()))
        return found

    def _delay(self) -> float:
        waited = time.monotonic() - self._since
        return min(max(waited * _SHARE, self._shortest), self._longest)
