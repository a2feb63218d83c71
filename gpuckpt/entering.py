"""The ranks of a run enter its root, or their roots, where each machine has one of its own.

Which ranks have the same root is seen by files that each leaves there for a
moment.  The first of them is the lead there: it holds the lock, sweeps, commits
and deletes for all.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Iterator

from gpuckpt import layout
from gpuckpt.commit import writing
from gpuckpt.errors import CheckpointError
from gpuckpt.gathering import gather
from gpuckpt.groups import Group
from gpuckpt.stores import Store, write_all

log = logging.getLogger("gpuckpt")


@contextlib.contextmanager
def entered(store: Store, group: Group, timeout: float) -> Iterator[bool]:
    """Have the root, swept, until the end of the block; yields whether this rank is the lead.

    Every rank enters at the same time, and waits for the others.

    Raises:
        LockedError: this is the lead, and somebody else has the root.
        RankError: another rank can't enter.
    """
    lead = _is_lead(store, group, timeout)
    with contextlib.ExitStack() as held:
        outcome: str | CheckpointError = ""
        if lead:
            try:
                held.enter_context(writing(store))
                _tidy(store)
            except CheckpointError as error:
                outcome = error
        gather(group, "having the root", outcome, timeout)
        yield lead


def _is_lead(store: Store, group: Group, timeout: float) -> bool:
    token = gather(group, "entering the root", secrets.token_hex(4), timeout)[0]
    own = layout.marker_name(token, group.rank)
    outcome: str | CheckpointError = ""
    try:
        write_all(store, own, b"")
    except CheckpointError as error:
        outcome = error
    try:
        gather(group, "marks in the root", outcome, timeout)
        found = (layout.marker_rank(name, token) for name in store.names())
        lead = min({rank for rank in found if rank is not None} | {group.rank}) == group.rank
        gather(group, "looks at the root", "", timeout)
    finally:
        with contextlib.suppress(CheckpointError):
            store.remove(own)
    return lead


def _tidy(store: Store) -> None:
    """Remove the marks of ranks that died while they entered."""
    for name in store.names():
        if layout.is_marker(name):
            store.remove(name)
