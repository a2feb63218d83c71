"""The other ranks: the port through which the engine reaches them."""

from __future__ import annotations

from typing import Protocol


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


class Alone:
    """A group of one, who waits for nobody."""

    rank, size = 0, 1

    def all_gather(self, data: bytes, *, what: str, timeout: float) -> list[bytes]:  # noqa: ARG002
        """What it gave."""
        return [data]

    def barrier(self, *, what: str, timeout: float) -> None:
        """Nothing."""
