"""The ranks of a run enter its root, or their roots, where each machine has one of its own.

Which ranks have the same root is seen by files that each leaves there for a
moment.  The first of them is the lead there: it holds the lock, sweeps, commits
and deletes for all.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from gpuckpt import layout
from gpuckpt.commit import writing
from gpuckpt.errors import CheckpointError, RankError
from gpuckpt.gathering import gather_done
from gpuckpt.groups import Group
from gpuckpt.stores import Store, write_all


@dataclass(frozen=True, slots=True)
class Site:
    """Who leads where: of each rank, the lead of its root; seen by one of them, `rank`.

    `run` is a word that they have drawn for this time.
    """

    leads: tuple[int, ...]
    rank: int
    run: str = ""

    @property
    def lead(self) -> int:
        """The lead of this rank's root."""
        return self.leads[self.rank]

    @property
    def is_lead(self) -> bool:
        """Whether that is this rank."""
        return self.lead == self.rank

    @property
    def is_one(self) -> bool:
        """Whether all have the same root."""
        return len(set(self.leads)) == 1

    @property
    def here(self) -> list[int]:
        """The ranks that have this root."""
        return [rank for rank, lead in enumerate(self.leads) if lead == self.lead]


@contextlib.contextmanager
def entered(store: Store, group: Group, timeout: float) -> Iterator[Site]:
    """Have the root, swept, until the end of the block; yields who leads where.

    Every rank enters at the same time, and waits for the others.

    Raises:
        LockedError: this is the lead, and somebody else has the root.
        RankError: another rank can't enter.
    """
    site = _site(store, group, timeout)
    with contextlib.ExitStack() as held:

        def take() -> str:
            if site.is_lead:
                held.enter_context(writing(store))
            return ""

        gather_done(group, "having the root", take, timeout)
        yield site


def _site(store: Store, group: Group, timeout: float) -> Site:
    """Who leads where, by the marks that are seen in each root."""
    token = gather_done(group, "entering the root", lambda: secrets.token_hex(4), timeout)[0]
    own = layout.marker_name(token, group.rank)

    def mark() -> str:
        write_all(store, own, b"")
        return ""

    def look() -> int:
        found = (layout.marker_rank(name, token) for name in store.names())
        return min({rank for rank in found if rank is not None} | {group.rank})

    try:
        gather_done(group, "marks in the root", mark, timeout)
        leads = gather_done(group, "looks at the root", look, timeout)
    finally:
        with contextlib.suppress(CheckpointError):
            store.remove(own)
    odd = [rank for rank, lead in enumerate(leads) if leads[lead] != lead]
    if odd:
        raise RankError(
            odd,
            f"{store.root}: they see the mark of a rank that sees one of another root; see "
            "whether the file system shows all machines the same names",
        )
    return Site(tuple(leads), group.rank, token)
