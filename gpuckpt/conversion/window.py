"""A stranger's file, read here and there: never past its end, and never much at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from gpuckpt.errors import CorruptError
from gpuckpt.stores import Bytes, Store

# What is read ahead of small requests that follow each other.
_AHEAD_NBYTES = 64 << 10
_REMEDY = "take the file anew from where it was written, or convert another checkpoint"


class Window:
    """One file of a store.  Offsets are in bytes from its beginning."""

    def __init__(self, store: Store, name: str, ahead_nbytes: int = _AHEAD_NBYTES) -> None:
        """Asks for the file's size, and reads nothing yet."""
        self._store, self._name, self._ahead_nbytes = store, name, ahead_nbytes
        self.where = f"{store.root}/{name}"
        self.nbytes = store.size(name)
        self._begin, self._kept = 0, b""

    def take(self, offset: int, nbytes: int) -> bytes:
        """A few bytes.

        Raises:
            CorruptError: the file ends before; nothing has been allocated for them.
        """
        self.check(offset, nbytes)
        at = offset - self._begin
        if not 0 <= at <= len(self._kept) - nbytes:
            buffer = bytearray(min(max(nbytes, self._ahead_nbytes), self.nbytes - offset))
            self._store.read_into(self._name, offset, memoryview(buffer))
            self._begin, self._kept, at = offset, bytes(buffer), 0
        return self._kept[at : at + nbytes]

    def fill(self, offset: int, buffer: memoryview) -> None:
        """Many bytes, into `buffer` (uint8)."""
        if buffer.nbytes < _AHEAD_NBYTES // 8:
            buffer[:] = self.take(offset, buffer.nbytes)
        else:
            self.check(offset, buffer.nbytes)
            self._store.read_into(self._name, offset, buffer)

    def forget(self) -> None:
        """Let go of what was read ahead."""
        self._begin, self._kept = 0, b""

    def check(self, offset: int, nbytes: int) -> None:
        """See that the file has these bytes.

        Raises:
            CorruptError: it ends before.
        """
        if nbytes > self.nbytes - offset:
            raise self.corrupt(
                f"{nbytes} bytes should follow byte {offset}, and it ends at {self.nbytes}"
            )

    def corrupt(self, reason: str) -> CorruptError:
        """What to raise where the file isn't what it should be."""
        return CorruptError(self.where, reason, _REMEDY)


@dataclass(frozen=True, slots=True)
class Run:
    """Elements of a file: `count` of them, each `nbytes` long, the next one `stride` bytes on."""

    window: Window
    offset: int
    count: int
    nbytes: int
    stride: int

    def cut(self, start: int, count: int) -> Run:
        """`count` of the elements, from the `start`-th on."""
        return Run(self.window, self.offset + start * self.stride, count, self.nbytes, self.stride)

    def fill(self, buffer: Bytes) -> None:
        """Read all elements into `buffer`, without what lies between them."""
        if self.stride == self.nbytes:
            self.window.fill(self.offset, buffer.data)
            return
        spaced = np.empty(self.count * self.stride, np.uint8)
        # The last one is followed by nothing that is its own.
        end = (self.count - 1) * self.stride + self.nbytes
        self.window.fill(self.offset, spaced[:end].data)
        buffer.reshape(-1, self.nbytes)[:] = spaced.reshape(-1, self.stride)[:, : self.nbytes]


def gather(runs: Iterable[Run], nbytes: int, part_nbytes: int) -> Iterator[memoryview]:
    """The elements of all runs, `nbytes` in all, one after the other, in parts so long at most.

    Each part is a whole number of elements, and valid until the next one is asked for.
    """
    room, used = np.empty(0, np.uint8), 0
    for run in runs:
        start = 0
        while start < run.count:
            if not len(room):
                room = np.empty(min(part_nbytes, nbytes) // run.nbytes * run.nbytes, np.uint8)
            count = min(run.count - start, (len(room) - used) // run.nbytes)
            end = used + count * run.nbytes
            run.cut(start, count).fill(room[used:end])
            start, used = start + count, end
            if len(room) - used < run.nbytes:
                yield room[:used].data
                used = 0
    if used:
        yield room[:used].data
