"""What a rank holds, and what it tells the others of it: rows of names, types and boxes."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import zstandard

from gpuckpt.boxes import Box
from gpuckpt.dtypes import to_numpy
from gpuckpt.inventory import Roster

# What ranks are asked first.
FIRST_ASKED = "whether ranks hold the same"


@dataclass(frozen=True, slots=True)
class Holding:
    """What a rank holds, of which others may hold the same: name, type, whole shape and box."""

    name: str
    dtype: str
    whole: tuple[int, ...]
    box: Box

    @property
    def nbytes(self) -> int:
        """Bytes of its box."""
        return self.box.count * to_numpy(self.dtype).itemsize


def holdings(roster: Roster) -> list[Holding]:
    """What a rank holds that others may hold too: all but what is its own."""
    return [
        Holding(spec.name, spec.dtype, spec.full_shape, spec.box)
        for at, spec in enumerate(roster.specs)
        if at not in roster.private
    ]


def pack_holdings(held: Sequence[Holding]) -> str:
    """As a short text, for the other ranks: JSON, compressed, in ASCII letters."""
    return base64.b64encode(zstandard.compress(_text(held))).decode()


def unpack_holdings(text: str) -> list[Holding]:
    """The inverse of `pack_holdings`."""
    return [
        Holding(name, dtype, tuple(whole), Box(tuple(offset), tuple(shape)))
        for name, dtype, whole, offset, shape in json.loads(
            zstandard.decompress(base64.b64decode(text))
        )
    ]


def digest(held: Sequence[Holding]) -> str:
    """The same for two ranks' holdings exactly if they are equal."""
    return hashlib.sha256(_text(held)).hexdigest()[:32]


def _text(held: Sequence[Holding]) -> bytes:
    rows = [[one.name, one.dtype, one.whole, one.box.offset, one.box.shape] for one in held]
    return json.dumps(rows, separators=(",", ":")).encode()


def exchanged(
    rank: int, held: Sequence[Holding], gather: Callable[[str, str], list[str]]
) -> tuple[list[list[Holding]], list[str]]:
    """What each rank holds, by rank, and its digest; of ranks that hold the same it is one list.

    First all `gather` digests, then, unless they are equal, one rank of each
    digest gives what it holds.
    """
    digests = gather(FIRST_ASKED, digest(held))
    first = {one: at for at, one in reversed([*enumerate(digests)])}
    if len(first) == 1:
        return [[*held]] * len(digests), digests
    own = pack_holdings(held) if first[digests[rank]] == rank else ""
    texts = gather("what ranks hold", own)
    known = {one: unpack_holdings(texts[at]) for one, at in first.items()}
    return [known[one] for one in digests], digests
