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

    def all_gather(self, data: bytes, *, timeout: float) -> list[bytes]:
        """What every rank gave, by rank; blocks until all have, `timeout` seconds at most.

        Raises:
            RankError: some ranks didn't come in time; it names them.  Every
                rank that waits gets it, and the group can be used again.
        """
        ...

    def barrier(self, *, timeout: float) -> None:
        """Wait until every rank has come here; raises what `all_gather` does."""
        ...


class Alone:
    """A group of one, who waits for nobody."""

    rank, size = 0, 1

    def all_gather(self, data: bytes, *, timeout: float) -> list[bytes]:  # noqa: ARG002
        """What it gave."""
        return [data]

    def barrier(self, *, timeout: float) -> None:
        """Nothing."""
