"""Gives a rank's files to the other ranks of its run, and to nobody else."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Sequence
from typing import Any

from gpuckpt.apart import Apart, Flag
from gpuckpt.errors import CheckpointError, CorruptError
from gpuckpt.replicas import wire
from gpuckpt.replicas.shelf import Item, is_file, pack_items, parts_of
from gpuckpt.stores import Store

log = logging.getLogger("gpuckpt")

CONNECTIONS_MAX = 32
# A caller that waits for news is answered by then, with or without.
NEWS_SECONDS = 10.0
_LISTEN_SECONDS = 0.2


class Server:
    """Listens on a port of its own from `start` to `close`.

    Takes `CONNECTIONS_MAX` callers at a time, with 1 MiB for each.
    """

    def __init__(self, stores: dict[str, Store], address: str) -> None:
        """`stores` by the names that callers have for them; `address` is the interface's."""
        self._stores, self._address = stores, address
        self._secret, self._stopped = b"", Flag()
        self._known = Flag()
        self._changed = threading.Condition()
        self._generation, self._items = 0, list[Item]()
        self._kept: dict[int, int] = {}
        self._callers: set[socket.socket] = set()
        self._socket: socket.socket | None = None
        self._apart = Apart(self._listen, daemon=True)

    def start(self) -> int:
        """Begin to listen; the port."""
        self._socket = socket.create_server((self._address, 0), backlog=CONNECTIONS_MAX)
        self._socket.settimeout(_LISTEN_SECONDS)
        self._apart.start()
        port: int = self._socket.getsockname()[1]
        return port

    def trust(self, secret: bytes) -> None:
        """From here on whoever knows the secret is served; until then, callers wait."""
        self._secret = secret
        self._known.set()

    def publish(self, items: Sequence[Item]) -> int:
        """These files are there to be copied from now on; the number of this list."""
        with self._changed:
            self._generation += 1
            self._items = list(items)
            self._changed.notify_all()
            return self._generation

    def kept(self, rank: int) -> int:
        """The number of the last list of which that rank has said that it has every file."""
        return self._kept.get(rank, 0)

    def close(self) -> None:
        """Serve nobody any more."""
        self._stopped.set()
        self._known.set()
        if self._socket is not None:
            self._socket.close()
        for caller in tuple(self._callers):
            with contextlib.suppress(OSError):
                caller.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        assert self._socket is not None
        while not self._stopped.is_set():
            try:
                caller, _ = self._socket.accept()
            except TimeoutError:
                continue
            except OSError:
                break  # it was closed
            if len(self._callers) >= CONNECTIONS_MAX:
                caller.close()
                continue
            self._callers.add(caller)
            threading.Thread(target=self._serve, args=(caller,), daemon=True).start()

    def _serve(self, caller: socket.socket) -> None:
        try:
            caller.settimeout(wire.SECONDS)
            if not self._known.wait(wire.SECONDS) or self._stopped.is_set():
                return
            wire.welcome(caller, self._secret)
            room = memoryview(bytearray(wire.PART_NBYTES))
            while not self._stopped.is_set():
                self._answer(caller, wire.take(caller, wire.ASK_NBYTES_MAX), room)
        except (CheckpointError, OSError) as error:
            log.debug("a caller was left: %s", error)
        finally:
            self._callers.discard(caller)
            caller.close()

    def _answer(self, caller: socket.socket, asked: Any, room: memoryview) -> None:
        try:
            if asked["ask"] == "items":
                self._tell(caller, int(asked["rank"]), int(asked["have"]))
                return
            store, name = self._stores[asked["ask"]], asked["name"]
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError("a caller", f"it asks for {asked!r:.80}") from error
        if not is_file(name) or name not in store.names():
            wire.refuse_file(caller)
            return
        item = Item(name, store.size(name))
        wire.send_file(caller, item.nbytes, parts_of(store, item, room))

    def _tell(self, caller: socket.socket, rank: int, have: int) -> None:
        """Wait for a list that is newer than what the caller has, and tell it."""
        self._kept[rank] = have
        with self._changed:
            self._changed.wait_for(
                lambda: self._generation > have or self._stopped.is_set(), NEWS_SECONDS
            )
            generation, items = self._generation, self._items
        wire.send(caller, {"number": generation, "items": pack_items(items)})
