"""What two ranks say to each other over a connection: who they are, and frames of bytes.

1. The one that was called sends 32 random bytes; the caller answers with the HMAC of
   these under the run's secret, and 32 of its own.
2. The one that was called answers these in the same way.  Nobody who doesn't know the
   secret is told anything else.
3. The caller asks, by frames of JSON; it gets frames, or a file: its length, its bytes,
   and their check value.

Whatever is read has a bound, and whoever waits, a time.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Any

from gpuckpt.errors import AuthenticationError, CorruptError, StorageError
from gpuckpt.fingerprint import Checksum

NONCE_NBYTES = 32
SECONDS = 30.0
"""The longest that a peer may say nothing."""
ASK_NBYTES_MAX, ANSWER_NBYTES_MAX = 64 << 10, 64 << 20
PART_NBYTES = 1 << 20
_FRAME, _FILE = struct.Struct("<I"), struct.Struct("<q")
_CALLER, _CALLED = b"gpuckpt 1 caller\0", b"gpuckpt 1 called\0"


def welcome(peer: socket.socket, secret: bytes) -> None:
    """See that a caller knows the secret, and show that we do.

    Raises:
        AuthenticationError: it doesn't.
    """
    challenge = secrets.token_bytes(NONCE_NBYTES)
    peer.sendall(challenge)
    answer, own = receive(peer, NONCE_NBYTES), receive(peer, NONCE_NBYTES)
    if not hmac.compare_digest(answer, _proof(secret, _CALLER, challenge)):
        raise AuthenticationError(_name(peer), "it doesn't know the run's secret", "see who calls")
    peer.sendall(_proof(secret, _CALLED, own))


def introduce(peer: socket.socket, secret: bytes) -> None:
    """Show whom we called that we know the secret, and see that it does: undoes `welcome`.

    Raises:
        AuthenticationError: it doesn't.
    """
    challenge, own = receive(peer, NONCE_NBYTES), secrets.token_bytes(NONCE_NBYTES)
    peer.sendall(_proof(secret, _CALLER, challenge) + own)
    if not hmac.compare_digest(receive(peer, NONCE_NBYTES), _proof(secret, _CALLED, own)):
        raise AuthenticationError(
            _name(peer), "it doesn't know the run's secret", "see who listens there"
        )


def send(peer: socket.socket, said: Any) -> None:
    """Send a frame."""
    text = json.dumps(said, separators=(",", ":")).encode("ascii")
    peer.sendall(_FRAME.pack(len(text)) + text)


def take(peer: socket.socket, most_nbytes: int) -> Any:
    """Receive a frame: undoes `send`.

    Raises:
        CorruptError: it is longer, or no JSON.
        StorageError: the peer has gone.
    """
    (nbytes,) = _FRAME.unpack(receive(peer, _FRAME.size))
    if nbytes > most_nbytes:
        raise CorruptError(_name(peer), f"a frame of {nbytes} bytes, {most_nbytes} at most")
    text = receive(peer, nbytes)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptError(_name(peer), f"not a frame ({error})") from error


def send_file(peer: socket.socket, nbytes: int, parts: Iterable[memoryview]) -> None:
    """Send a file of so many bytes; the parts' memory is the caller's again at the next."""
    peer.sendall(_FILE.pack(nbytes))
    found = Checksum(128)
    for part in parts:
        found.update(part)
        peer.sendall(part)
    peer.sendall(bytes.fromhex(found.checksum()))


def refuse_file(peer: socket.socket) -> None:
    """Say that there is no such file."""
    peer.sendall(_FILE.pack(-1))


def take_file(peer: socket.socket, nbytes: int, room: memoryview) -> Iterator[memoryview]:
    """Receive a file that should have so many bytes, part by part: undoes `send_file`.

    Raises:
        StorageError: it isn't there any more, or the peer has gone.
        CorruptError: it has another length, or, after the last part, other bytes.
    """
    (found,) = _FILE.unpack(receive(peer, _FILE.size))
    if found < 0:
        raise StorageError(f"{_name(peer)} doesn't have the file any more; it is asked again")
    if found != nbytes:
        raise CorruptError(_name(peer), f"a file of {found} bytes, {nbytes} expected")
    checked, left = Checksum(128), nbytes
    while left:
        part = room[: min(left, room.nbytes)]
        _receive_into(peer, part)
        checked.update(part)
        left -= part.nbytes
        yield part
    if receive(peer, 16).hex() != checked.checksum():
        raise CorruptError(_name(peer), "what came isn't what was sent")


def receive(peer: socket.socket, nbytes: int) -> bytes:
    """So many bytes, no fewer."""
    room = bytearray(nbytes)
    _receive_into(peer, memoryview(room))
    return bytes(room)


def _receive_into(peer: socket.socket, room: memoryview) -> None:
    while room.nbytes:
        count = peer.recv_into(room)
        if not count:
            raise StorageError(f"{_name(peer)} has gone")
        room = room[count:]


def _proof(secret: bytes, who: bytes, challenge: bytes) -> bytes:
    return hmac.digest(secret, who + challenge, "sha256")


def _name(peer: socket.socket) -> str:
    try:
        host, port, *_ = peer.getpeername()
    except (OSError, ValueError):
        return "a rank"
    return f"{host}:{port}"
