"""Ranks that meet on a board: a place where each can put a value that all can read.

Every rank puts its message there; rank 0 takes them all, and puts up an answer:
what all gave, what it has made of that, or who was missing.  So whoever is
missing has a name, and a round has one outcome for all.  What it costs, by number of ranks N:

| | each rank | rank 0 |
|---|---|---|
| first round | 2 puts, 3 waits, 2 removals | 2 puts, 2(N-1) waits, 1 removal |
| every other | 1 put, 1 wait, 1 removal | 1 put, N-1 waits, 1 removal |

Most of rank 0's waits find what is there already, so they cost a request each.
With N = 16,384 and 300 bytes a rank, rank 0 itself computes for 0.16 s a round
(measured on one core); if a request to a key-value server takes 20 µs, they take
0.3 s more.  The answer has 4.9 MB, which the board hands out N times, 80 GB in
all: so above about a thousand ranks, give many bytes rarely.  The answer of a barrier,
and of a round in which rank 0 decides, is short for any N.  In a store with 20 ms a
request, rank 0 takes 5 s for 256 ranks, and 5.5 minutes for 16,384: have a key-value
server there.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

from gpuckpt.errors import CheckpointError, ClosedError, InvalidError, RankError
from gpuckpt.groups import UndecidedError
from gpuckpt.groups.board import Board, Leavable
from gpuckpt.groups.follower import Follower, Grace
from gpuckpt.groups.leader import Leader


class Meeting:
    """A `Group` whose ranks meet on a board.

    A round that failed can be followed by others.  Ranks that come late to it
    find it failed, at once.  If ranks are at different things, both fail, for
    all, also for those who come to one of them later; so ranks that lost each
    other are together again after as many rounds as they were apart.

    A rank whose time is over ends the round for all: whoever isn't there then is
    missing.  If rank 0 is, the others know of nobody else, and name it.
    """

    def __init__(
        self, board: Board, rank: int, size: int, name: str = "gpuckpt", *, grace: float = 5.0
    ) -> None:
        """`name` (lower-case letters, digits, `-`) is this group's on the board.

        Groups that begin one after the other may have the same name, also
        those of runs that have died, as long as no two begin at once.
        `grace` and a tenth of a time-out is what rank 0 has to tell the others
        that a round is over; without that they take it for missing.
        """
        if not 0 <= rank < size:
            raise InvalidError(f"ranks are from 0 to the group's size less 1, got {rank} of {size}")
        self.rank, self.size = rank, size
        self._board, self._name, self._grace = board, name, grace
        self._member: Leader | Follower
        self._leavable = Leavable(board)
        if rank == 0:
            self._member = Leader(self._leavable, size, name, Grace(grace))
        else:
            self._member = Follower(self._leavable, rank, name, Grace(grace))
        self._turn, self._process = threading.Lock(), os.getpid()

    def all_gather(self, data: bytes, *, what: str, timeout: float) -> list[bytes]:
        """What every rank gave, by rank."""
        try:
            with self._at(what, timeout):
                return [data] if self.size == 1 else self._member.gather(bytes(data), what, timeout)
        except UndecidedError as error:
            # Whoever decides by what is gathered may have decided in a round before this one.
            raise RankError(error.ranks, error.reason) from None

    def decide(
        self, data: bytes, choose: Callable[[list[bytes]], bytes], *, what: str, timeout: float
    ) -> bytes:
        """What `choose` has made, on rank 0, of what every rank gave."""
        with self._at(what, timeout):
            if self.size == 1:
                return choose([data])
            return self._member.decide(bytes(data), choose, what, timeout)

    def barrier(self, *, what: str, timeout: float) -> None:
        """Wait until every rank has come here."""
        self.all_gather(b"", what=what, timeout=timeout)

    def leave(self, *, leaving: bool = True) -> None:
        """Let the round fail that this rank waits in, within a second or so, and every later one.

        Until somebody says that it isn't leaving.  Any thread may call; the others
        hear that it was interrupted.
        """
        self._leavable.is_left = leaving

    def beside(self, name: str) -> Meeting | None:
        """The same ranks for another thread; None if one alone may use their board."""
        if not getattr(self._board, "for_threads", False):
            return None
        name = f"{self._name}-{name}"
        return Meeting(self._board, self.rank, self.size, name, grace=self._grace)

    def close(self, timeout: float = 5.0) -> None:
        """Wait until all ranks have the last answer, which may end with rank 0's process.

        `timeout` is in seconds.  Raises nothing; the group can still be used.
        """
        if isinstance(self._member, Leader) and os.getpid() == self._process:
            with contextlib.suppress(CheckpointError, ConnectionError):
                self._member.linger(timeout)

    @contextlib.contextmanager
    def _at(self, what: str, timeout: float) -> Iterator[None]:
        """Be in a round, by oneself."""
        if not timeout > 0:
            raise InvalidError(f"a time-out is a number of seconds above 0, got {timeout!r}")
        with self._alone(what):
            try:
                yield
            except ConnectionError as error:
                raise RankError(
                    [0],
                    f"the place where ranks meet can't be reached, for {what!r} ({error}); it is "
                    "often in the process of rank 0: see whether that has ended",
                ) from error

    @contextlib.contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """See that one thread of the process that made this is here, and no other."""
        if os.getpid() != self._process:
            raise ClosedError(
                f"rank {self.rank}: {what!r} in a process forked from the rank's, which is none; "
                "do it in the rank's own"
            )
        if not self._turn.acquire(blocking=False):
            raise InvalidError(f"rank {self.rank}: {what!r} while another thread meets the ranks")
        try:
            yield
        finally:
            self._turn.release()
