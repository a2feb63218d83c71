"""A copy of each rank's files on another machine: what one machine takes with it is elsewhere.

For ranks whose roots are on disks of their own machines.  Every rank listens,
and follows another, of whose files it keeps a copy in a store beside its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import secrets
import socket
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Self

from gpuckpt.apart import Apart
from gpuckpt.errors import CheckpointError, CorruptError, RankError, StorageError
from gpuckpt.groups import Group
from gpuckpt.layout import manifest_step
from gpuckpt.replicas.caller import Peer, calling
from gpuckpt.replicas.copies import bring, tidy
from gpuckpt.replicas.follower import Follower
from gpuckpt.replicas.ring import keepers, rank_of
from gpuckpt.replicas.server import Server
from gpuckpt.replicas.shelf import Item, every_item, items_of, pack_items, unpack_items
from gpuckpt.stores import Store

log = logging.getLogger("gpuckpt")

_LOOK_SECONDS = 0.02
_CLOSE_SECONDS = 5.0


class Replicas:
    """Copies of this rank's files elsewhere, and of another's here.

    `store` is the rank's own root, whose lock its user holds; `spare` a store
    on the same disk for the other's files, which it locks itself.  Nobody but
    ranks of this group is served; what goes over the network is checked, and
    not encrypted.
    """

    def __init__(
        self,
        group: Group,
        store: Store,
        spare: Store,
        *,
        address: str | None = None,
        host: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        """`address` is that of the interface to listen on, the host name's unless given.

        `host` tells machines apart, by their names unless given.  Collectives
        wait `timeout` seconds for other ranks.
        """
        self._group, self._store, self._spare, self._timeout = group, store, spare, timeout
        self._host = host or socket.gethostname()
        self._address = address
        self._server: Server | None = None
        self._follower: Follower | None = None
        self._peers: list[Peer] = []
        self._secret, self._published = b"", 0
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Open it."""
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    @property
    def keeper(self) -> int:
        """The rank that keeps this one's copy."""
        return keepers([peer.host for peer in self._peers])[self._group.rank]

    def open(self) -> None:
        """Listen, and follow; every rank calls it.

        Raises:
            LockedError: another process has the spare store.
            RankError: ranks are missing.
        """
        try:
            Apart(lambda: self._open.enter_context(self._spare.lock())).run()
            tidy(self._spare)
            address = self._address or _address()
            self._server = Server({"root": self._store, "spare": self._spare}, address)
            said = {
                "host": self._host,
                "address": address,
                "port": self._server.start(),
                "secret": secrets.token_hex(32),
            }
            text = json.dumps(said).encode()
            what = "where replicas are"
            self._meet(self._group.all_gather(text, what=what, timeout=self._timeout))
            self._server.trust(self._secret)
        except BaseException:
            self.close()
            raise

    def follow(self) -> None:
        """Begin to copy what others publish; after `recover`, if that is wanted."""
        if self._follower is not None:
            return
        kept = keepers([peer.host for peer in self._peers])
        rank = self._group.rank
        owners = [peer for peer in self._peers if kept[peer.rank] == rank != peer.rank]
        self._follower = Follower(rank, owners, self._spare, self._secret)
        self._follower.start()

    def after_commit(self, names: Sequence[str]) -> None:
        """These are the files of this rank that must not be lost, all of them, manifests too.

        Returns at once; the keeper copies what it lacks, and then drops what isn't named any more.
        The files must stay until the next call.
        """
        assert self._server is not None, "it isn't open"
        self.follow()
        self._published = self._server.publish(items_of(self._store, names))

    def is_kept(self, seconds: float = 0.0) -> bool:
        """Whether the keeper has said that it has all that was published; waits for that."""
        assert self._server is not None, "it isn't open"
        end = time.monotonic() + seconds
        while self._server.kept(self.keeper) < self._published:
            if time.monotonic() >= end:
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def recover(self) -> list[str]:
        """Bring back what this rank's root lacks, from whoever has it; what came, by name.

        Every rank calls it, before it restores.  What can't be had is told by
        the log: the step that it belongs to isn't whole, then.

        Raises:
            RankError: ranks are missing.
        """
        found = {"root": every_item(self._store), "spare": every_item(self._spare)}
        said = json.dumps({place: pack_items(items) for place, items in found.items()})
        what = "what replicas have"
        told = self._group.all_gather(said.encode(), what=what, timeout=self._timeout)
        brought: list[str] = []
        tidy(self._store)
        for peer, place, items in self._sources(told):
            brought += self._bring(peer, place, items)
        self._group.barrier(what="replicas are back", timeout=self._timeout)  # till then all listen
        if brought:
            log.warning("brought back from other ranks: %s", ", ".join(brought))
        return brought

    def close(self) -> None:
        """Neither listen nor follow any more; safe to call twice."""
        if self._server is not None:
            self._server.close()
        if self._follower is not None:
            self._follower.close(_CLOSE_SECONDS)
        Apart(self._open.close).run()

    def _meet(self, said: Sequence[bytes]) -> None:
        texts = [_parsed(text, rank) for rank, text in enumerate(said)]
        self._peers = [
            Peer(rank, str(text["host"]), str(text["address"]), int(text["port"]))
            for rank, text in enumerate(texts)
        ]
        own = self._peers[self._group.rank].address
        hosts = {peer.host for peer in self._peers}
        if self._address is None and own.startswith("127.") and len(hosts) > 1:
            log.warning("other machines can't reach this one at %s: give address=", own)
        every = "".join(str(text["secret"]) for text in texts)
        self._secret = hashlib.sha256(every.encode()).digest()

    def _sources(self, told: Sequence[bytes]) -> list[tuple[Peer, str, list[Item]]]:
        """Who has files of this rank, the newest first, and which of them are wanted.

        Of a step older than the newest here nothing is.
        """
        rank = self._group.rank
        here = max((_step(name) for name in self._store.names()), default=-1)
        found = []
        for peer in self._peers:
            for place, rows in _parsed(told[peer.rank], peer.rank).items():
                if peer.rank == rank and place == "root":
                    continue
                items = unpack_items(rows, f"rank {peer.rank}")
                own = [item for item in items if rank_of(item.name) == rank]
                manifests = [item for item in items if item.is_manifest]
                newest = max((_step(item.name) for item in manifests), default=-1)
                if own and newest >= here:
                    found.append((newest, peer, place, own + manifests))
        found.sort(key=lambda one: -one[0])
        return [(peer, place, items) for _, peer, place, items in found]

    def _lacks(self, item: Item) -> bool:
        """Whether it isn't here; another's manifest of a step that is here isn't wanted."""
        if item.name not in self._store.names():
            return True
        return not item.is_manifest and self._store.size(item.name) != item.nbytes

    def _bring(self, peer: Peer, place: str, items: list[Item]) -> list[str]:
        try:
            lacking = [item for item in items if self._lacks(item)]
            if not lacking:
                return []
            with calling(peer, self._secret) as caller:
                return bring(self._store, lacking, partial(caller.fetch, place))
        except CheckpointError as error:
            log.warning("what rank %d has of this one doesn't come: %s", peer.rank, error)
            return []


def _address() -> str:
    """This machine's address, by its name."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError as error:
        raise StorageError(
            f"{socket.gethostname()} isn't known by name ({error}): give address= that of the "
            "interface by which other ranks reach this one"
        ) from error


def _step(name: str) -> int:
    step = manifest_step(name)
    return -1 if step is None else step


def _parsed(text: bytes, rank: int) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise RankError([rank], f"what it says isn't understood ({error})") from error
    if not isinstance(found, dict):
        raise CorruptError(f"rank {rank}", "what it says isn't understood")
    return found
