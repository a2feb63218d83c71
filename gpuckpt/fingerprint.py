"""Check values: of raw bytes (`fingerprint`) and of encoded bytes (`checksum`).

Both are built from XXH3 (Collet, https://github.com/Cyan4973/xxHash).  The
fingerprint is a tree, so that a GPU can take its leaves at the same time
(docs/adr/0004): XXH3-128 of every 64 KiB, then XXH3-128 of these and the length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import xxhash

from gpuckpt.layout import LEAF_NBYTES

# The last leaf is filled up with zeros to a multiple of this, so that XXH3's
# short-input variants, which only a CPU runs well, never come into play.
LEAF_UNIT_NBYTES = 256


def fingerprint(raw: memoryview) -> str:
    """128 bits, as hex, of a chunk's raw bytes (uint8, contiguous)."""
    return root(leaf_digests(raw), raw.nbytes)


def checks_of(raws: Sequence[memoryview]) -> list[tuple[str, str]]:
    """`fingerprint` and `checksum` of each of some chunks of at most a leaf, as they are."""
    found = []
    digest, check, whole = (
        xxhash.xxh3_128_digest,
        xxhash.xxh3_64_hexdigest,
        xxhash.xxh3_128_hexdigest,
    )
    for raw in raws:
        nbytes = raw.nbytes
        assert 0 < nbytes <= LEAF_NBYTES, nbytes
        short = -nbytes % LEAF_UNIT_NBYTES
        leaf = digest(raw.tobytes() + bytes(short) if short else raw)
        found.append((whole(leaf + nbytes.to_bytes(8, "little")), check(raw)))
    return found


def leaf_digests(raw: memoryview) -> bytes:
    """16 bytes for each leaf of a chunk's raw bytes: what a GPU takes by itself."""
    nbytes = raw.nbytes
    whole = nbytes - nbytes % LEAF_NBYTES
    digest = xxhash.xxh3_128_digest
    leaves = [digest(raw[at : at + LEAF_NBYTES]) for at in range(0, whole, LEAF_NBYTES)]
    if whole < nbytes:
        tail = raw[whole:].tobytes()
        leaves.append(digest(tail + bytes(-len(tail) % LEAF_UNIT_NBYTES)))
    return b"".join(leaves)


def root(digests: bytes, nbytes: int) -> str:
    """The fingerprint of a chunk of `nbytes` whose leaves have these digests."""
    return xxhash.xxh3_128_hexdigest(digests + nbytes.to_bytes(8, "little"))


def checksum(parts: Iterable[memoryview | bytes]) -> str:
    """64 bits, as hex, of encoded bytes that lie in several places."""
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part)
    return state.hexdigest()


def digest(parts: Iterable[memoryview | bytes]) -> str:
    """SHA-256, as hex, of encoded bytes that lie in several places: what a seal is of."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()


def checksum128(data: bytes | memoryview) -> str:
    """128 bits, as hex, of a manifest's or an index's bytes."""
    return xxhash.xxh3_128_hexdigest(data)


class Checksum:
    """A check value of encoded bytes that come one after the other, and their SHA-256 if asked."""

    def __init__(self, bits: int = 64, *, digest: bool = False) -> None:
        """`bits` is 64, as `checksum` has, or 128, as `checksum128`."""
        self._state = xxhash.xxh3_64() if bits == 64 else xxhash.xxh3_128()
        self._digest = hashlib.sha256() if digest else None

    def update(self, part: memoryview) -> None:
        """Take the next bytes."""
        self._state.update(part)
        if self._digest is not None:
            self._digest.update(part)

    def checksum(self) -> str:
        """The check value, as hex."""
        return self._state.hexdigest()

    def digest(self) -> str:
        """The SHA-256, as hex; empty if it wasn't asked for."""
        return "" if self._digest is None else self._digest.hexdigest()
