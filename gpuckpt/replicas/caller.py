"""A connection to another rank's server."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from gpuckpt.errors import CorruptError, StorageError
from gpuckpt.replicas import wire
from gpuckpt.replicas.shelf import Item, unpack_items

CONNECT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Peer:
    """Where a rank's server is."""

    rank: int
    host: str
    address: str
    port: int


class Caller:
    """Asks one server, one question at a time; with 1 MiB for files."""

    def __init__(self, connection: socket.socket, where: str) -> None:
        """`connection` stays the caller's."""
        self._connection, self._where = connection, where
        self._room = memoryview(bytearray(wire.PART_NBYTES))

    def cut(self) -> None:
        """From another thread: whoever waits for an answer gets none."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def items(self, rank: int, have: int) -> tuple[int, list[Item]]:
        """Tell that `rank` has list number `have`; the newest list and its number.

        Waits a while for a newer one.
        """
        wire.send(self._connection, {"ask": "items", "rank": rank, "have": have})
        told = wire.take(self._connection, wire.ANSWER_NBYTES_MAX)
        try:
            return int(told["number"]), unpack_items(told["items"], self._where)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(self._where, f"not an answer ({error})") from error

    def fetch(self, store: str, item: Item) -> Iterator[memoryview]:
        """A file of the server's `store`, part by part."""
        wire.send(self._connection, {"ask": store, "name": item.name})
        return wire.take_file(self._connection, item.nbytes, self._room)


@contextlib.contextmanager
def calling(peer: Peer, secret: bytes) -> Iterator[Caller]:
    """Call a rank until the end of the block.

    Raises:
        StorageError: it isn't there, or has gone, or says nothing for 30 s.
        AuthenticationError: it isn't of this run.
    """
    where = f"rank {peer.rank} on {peer.host}"
    try:
        with socket.create_connection((peer.address, peer.port), CONNECT_SECONDS) as connection:
            connection.settimeout(wire.SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wire.introduce(connection, secret)
            yield Caller(connection, where)
    except StorageError as error:
        raise StorageError(f"{where}: {error}") from error
    except OSError as error:
        raise StorageError(
            f"{where} can't be reached at {peer.address}:{peer.port}: {error}"
        ) from error
