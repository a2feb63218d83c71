"""A file of a local directory that is open for reading."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gpuckpt.errors import CorruptError
from gpuckpt.native import FEWEST_NBYTES, native
from gpuckpt.stores import Bytes
from gpuckpt.stores.cached import read_parts
from gpuckpt.stores.refusals import translated


class LocalFile:
    """A file of a `LocalStore` that is open for reading."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """`descriptor` stays the caller's, who closes it."""
        self._path, self._descriptor = path, descriptor

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on, through the page cache."""
        self.read_parts(offset, [buffer])

    def read_parts(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill buffers, one after the other, from `offset` on, by one call of the system's."""
        try:
            found = read_parts(self._descriptor, buffers, offset)
        except OSError as error:
            raise translated(error, self._path, "read", f" at byte {offset}") from error
        self._check_end(offset, found, sum([buffer.nbytes for buffer in buffers]))

    def read_seen(self, offset: int, room: Bytes) -> tuple[bytes, int] | None:
        """Fill `room` and look at it, in one call of the compiled loops."""
        loops = native()
        if loops is None or room.size < FEWEST_NBYTES:
            return None
        try:
            found, digests, check = loops.read(self._descriptor, offset, room)
        except OSError as error:
            raise translated(error, self._path, "read", f" at byte {offset}") from error
        self._check_end(offset, found, room.size)
        return digests, check

    def _check_end(self, offset: int, found: int, nbytes: int) -> None:
        if found < nbytes:
            wanted, end = offset + nbytes, offset + found
            raise CorruptError(str(self._path), f"ends at {end}, {wanted} bytes expected")
