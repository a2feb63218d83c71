"""The other ranks: the port through which the engine reaches them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from gpuckpt.errors import RankError


class Group(Protocol):
    """The ranks of one run, which make and restore checkpoints together.

    Every rank calls the same methods in the same order, from one thread at a
    time, which need not be that of the training loop.  No method uses a
    channel that the loop uses too.  Payloads are small: a few hundred bytes a
    rank in each save, a few hundred kilobytes once a layout changes.
    """

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many ranks there are."""
        ...

    def all_gather(self, data: bytes, *, what: str, timeout: float) -> list[bytes]:
        """What every rank gave, by rank; blocks until all have, `timeout` seconds at most.

        `what` says what it is for, and names this one round: "parts of step
        300".  Each rank gives the same text; one that is at another is found
        by it, so texts of one run should differ.

        Raises:
            RankError: some ranks didn't come in time, or are at something
                else; it names them.  Every rank gets it that waits or comes
                later, and the group can be used again.
        """
        ...

    def barrier(self, *, what: str, timeout: float) -> None:
        """Wait until every rank has come here; raises what `all_gather` does."""
        ...


@runtime_checkable
class Decides(Protocol):
    """What a `Group` may have besides, and saves every save a round if it has.

    All of gpuckpt's own have it.
    """

    def decide(
        self, data: bytes, choose: Callable[[list[bytes]], bytes], *, what: str, timeout: float
    ) -> bytes:
        """What `choose` makes, on rank 0, of what every rank gave, by rank.

        One round, as `all_gather`, but rank 0 alone gets what all gave.  It
        calls `choose`, which may take long and must not raise, and all get
        what that returns.  `timeout` is for both.

        Raises:
            UndecidedError: some ranks didn't come, and rank 0 has said that it chose nothing.
            RankError: as `all_gather`; who knows what rank 0 chose.  On rank 0, if
                `choose` was called, the others may have heard what it chose.
        """
        ...


class UndecidedError(RankError):
    """A round that has failed for all ranks, before rank 0 decided anything."""


class Alone:
    """A group of one, who waits for nobody."""

    rank, size = 0, 1

    def all_gather(self, data: bytes, *, what: str, timeout: float) -> list[bytes]:  # noqa: ARG002
        """What it gave."""
        return [data]

    def barrier(self, *, what: str, timeout: float) -> None:
        """Nothing."""

    def decide(
        self, data: bytes, choose: Callable[[list[bytes]], bytes], *, what: str, timeout: float
    ) -> bytes:
        """What it chose."""
        del what, timeout
        return choose([data])
