"""Keys and seals: what shows that nobody without the key has written or changed a checkpoint.

A seal is HMAC-SHA256 (RFC 2104) of the text of a manifest or of a segment's
index, which with a key lists the SHA-256 of every chunk's encoded bytes.  The
check values of others (`fingerprint`) find damage; whoever wants can make
bytes that fit them.
"""

from __future__ import annotations

import hmac
import os
import re
from pathlib import Path
from typing import NoReturn

from gpuckpt.errors import AuthenticationError, InvalidError, NotFoundError

# Bytes are the key, all else is the path of a file that holds it.
Key = bytes | str | os.PathLike[str]

FEWEST_KEY_NBYTES, MOST_KEY_NBYTES = 32, 4096
# What is sealed is said first, so that no text passes for another kind.
MANIFEST, INDEX = b"gpuckpt 1 manifest\0", b"gpuckpt 1 index\0"
_SEAL = re.compile(rb',"seal":"([0-9a-f]{64})"\}\Z')
_SEAL_NBYTES = len(b',"seal":""}') + 64


class Seal:
    """Makes and checks seals with one key, which it doesn't hold as such, and never shows."""

    __slots__ = ("_keyed",)

    def __init__(self, key: bytes) -> None:
        """Take a key of 32 to 4,096 bytes.

        Raises:
            InvalidError: it is shorter or longer; the message doesn't tell it.
        """
        if not FEWEST_KEY_NBYTES <= len(key) <= MOST_KEY_NBYTES:
            raise InvalidError(
                f"a key has {FEWEST_KEY_NBYTES} to {MOST_KEY_NBYTES} bytes, this one {len(key)}; "
                "make one with `head -c 32 /dev/urandom > FILE`"
            )
        self._keyed = hmac.new(key, digestmod="sha256")

    def __repr__(self) -> str:
        return "Seal(of a key)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Seal isn't pickled or copied: the key would be in what is made of it")

    def sealed(self, text: bytes, kind: bytes) -> bytes:
        """A JSON object's text with its seal as its last field."""
        return b'%s,"seal":"%s"}' % (text[:-1], self._seal(text[:-1], kind))

    def check(self, text: bytes, kind: bytes, where: str) -> None:
        """See that a text is as it was sealed with this key: undoes `sealed`.

        Raises:
            AuthenticationError: it isn't.
        """
        found = _SEAL.search(text, max(len(text) - _SEAL_NBYTES, 0))
        if found is None:
            raise AuthenticationError(
                where,
                "it has no seal, so somebody without the key may have written it",
                "if you trust it, load it without a key, and save it with one",
            )
        if not hmac.compare_digest(found[1], self._seal(text[: found.start()], kind)):
            raise AuthenticationError(
                where,
                "its seal isn't this key's: another key was used, or somebody without it made "
                "changes",
                "give the key that it was saved with, or don't use it",
            )

    def _seal(self, text: bytes, kind: bytes) -> bytes:
        keyed = self._keyed.copy()
        keyed.update(kind)
        keyed.update(text)
        return keyed.hexdigest().encode("ascii")


def make_seal(key: Key | None) -> Seal | None:
    """What the option `key` asks for: bytes are the key, a path is of a file that holds it.

    Of a file all bytes are the key, a line's end too.

    Raises:
        InvalidError: it is neither, or a key of another length.
        NotFoundError: the file can't be read.
    """
    if key is None:
        return None
    if isinstance(key, bytes | bytearray):
        return Seal(bytes(key))
    if not isinstance(key, str | os.PathLike):
        raise InvalidError(f"key is bytes, or the path of a key file; got a {type(key).__name__}")
    return Seal(_read_key(key))


def _read_key(place: str | os.PathLike[str]) -> bytes:
    """A key file's bytes.  A string isn't shown: it may be a key, given where a path belongs."""
    shown = "the key file" if isinstance(place, str) else f"the key file {os.fspath(place)}"
    try:
        with Path(place).expanduser().open("rb") as file:
            return file.read(MOST_KEY_NBYTES + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no path"
    raise NotFoundError(f"{shown} can't be read ({why}); key= is the path of a file, or bytes")
