"""Keeps copies of other ranks' files up to date, in a thread that nobody waits for."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Sequence
from functools import partial

from gpuckpt.apart import Apart, Flag
from gpuckpt.errors import CheckpointError
from gpuckpt.replicas.caller import Caller, Peer, calling
from gpuckpt.replicas.copies import bring, drop
from gpuckpt.replicas.ring import rank_of
from gpuckpt.replicas.shelf import Item
from gpuckpt.stores import Store

log = logging.getLogger("gpuckpt")

# After a failure, the next try comes so much later, twice as long each time, up to the second.
PAUSES_SECONDS = (0.5, 30.0)


class Follower:
    """Copies what each of some ranks has published, to one store; a thread for each rank."""

    def __init__(self, rank: int, owners: Sequence[Peer], spare: Store, secret: bytes) -> None:
        """`rank` is whose copies these are not: the one that keeps them."""
        self._rank, self._spare, self._secret = rank, spare, secret
        # One at a time changes the store; and what each owner wants there.
        self._changing = threading.Lock()
        self._wanted: dict[int, set[str]] = {}
        self._stopped = Flag()
        self._callers: dict[int, Caller] = {}
        self._threads = [
            Apart(partial(self._follow, owner), partial(self._died, owner), daemon=True)
            for owner in owners
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def close(self, seconds: float) -> None:
        """End soon; waits for that, at most so long for each."""
        self._stopped.set()
        for caller in tuple(self._callers.values()):
            caller.cut()
        for thread in self._threads:
            thread.cancel_unless_begun()
            thread.ended.wait(seconds)

    def _follow(self, owner: Peer) -> None:
        pause, told = PAUSES_SECONDS[0], False
        while not self._stopped.is_set():
            try:
                self._call(owner)
            except CheckpointError as error:
                if not told and not self._stopped.is_set():
                    log.warning("no copies of rank %d's files are made: %s", owner.rank, error)
                told = True
                self._stopped.wait(pause)
                pause = min(pause * 2, PAUSES_SECONDS[1])

    def _call(self, owner: Peer) -> None:
        have = 0
        with calling(owner, self._secret) as caller:
            self._callers[owner.rank] = caller
            while not self._stopped.is_set():
                number, items = caller.items(self._rank, have)
                if number == have:
                    continue
                with self._changing:
                    brought = bring(self._spare, items, partial(caller.fetch, "root"))
                    self._tidy(owner, items)
                log.debug("copied of rank %d: %s", owner.rank, ", ".join(brought) or "nothing")
                have = number

    def _tidy(self, owner: Peer, items: Sequence[Item]) -> None:
        """Drop what this owner doesn't want any more, and of manifests what nobody wants."""
        self._wanted[owner.rank] = {item.name for item in items}
        wanted = set[str]().union(*self._wanted.values())
        unknown = {one for one in map(rank_of, self._spare.names()) if one is not None}
        all_known = unknown <= self._wanted.keys()
        names = [
            name
            for name in self._spare.names()
            if name not in wanted
            and (rank_of(name) == owner.rank or (rank_of(name) is None and all_known))
            and name.startswith("step-")
        ]
        with contextlib.suppress(CheckpointError):  # it costs room, and is tried again
            drop(self._spare, names)

    def _died(self, owner: Peer, error: BaseException) -> None:
        log.error("no copies of rank %d's files are made any more: %r", owner.rank, error)
