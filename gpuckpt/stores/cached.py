"""Write to a file, and read from one, through the system's page cache."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence

# Written pages go to the disk from here on, while later ones are still being
# made; else a sync would find all of them waiting.
_WRITEBACK_NBYTES = 8 << 20
_VIEWS_MAX = 512  # the system takes at most 1,024 at a time


class CachedFile:
    """An open file that is written, by large vectored writes, from `offset` on."""

    failure = None  # none comes later, and
    cpu_seconds = 0.0  # none is spent elsewhere: the caller writes
    waiting_nbytes = 0  # but for what the system keeps, and says nothing of

    def __init__(self, descriptor: int, offset: int) -> None:
        """`descriptor` stays the caller's, who closes it."""
        self.offset = offset
        self._descriptor, self._written_back = descriptor, offset

    def append(self, views: Sequence[memoryview]) -> None:
        """Write bytes, one view after the other; raises the system's `OSError`."""
        left = list(views)
        while left:
            count = write_some(self._descriptor, left[:_VIEWS_MAX], self.offset)
            self.offset += count
            while left and count >= left[0].nbytes:
                count -= left.pop(0).nbytes
            if count:  # a short write: the rest of this view is still to come
                left[0] = left[0][count:]
        if self.offset - self._written_back >= _WRITEBACK_NBYTES:
            self.start_writeback()

    def flush(self) -> None:
        """Nothing: every byte has been brought to the system."""

    def drop(self) -> None:
        """Nothing to let go of."""

    def start_writeback(self) -> None:
        """Hand written pages to the disk; on Linux, DONTNEED begins to write dirty ones."""
        ready = self.offset - self._written_back
        with contextlib.suppress(OSError):  # advice; whatever goes wrong, `fsync` will tell
            os.posix_fadvise(self._descriptor, self._written_back, ready, os.POSIX_FADV_DONTNEED)
        self._written_back = self.offset


def read_some(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` as far as the file goes; how many bytes that is."""
    done = 0
    while done < buffer.nbytes:
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            break
        done += count
    return done


def read_parts(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Fill buffers, one after the other, as far as the file goes; how many bytes that is."""
    done = 0
    for at in range(0, len(buffers), _VIEWS_MAX):
        some = buffers[at : at + _VIEWS_MAX]
        found = os.preadv(descriptor, some, offset + done)
        done += found
        for buffer in some:  # what a short read has left
            if found < buffer.nbytes:
                more = read_some(descriptor, buffer[found:], offset + done)
                done += more
                if more < buffer.nbytes - found:
                    return done
            found = max(found - buffer.nbytes, 0)
    return done


def write_some(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
    """Write at least one byte of what isn't empty; how many were."""
    count = os.pwritev(descriptor, views, offset)
    if not count:
        raise OSError(errno.EIO, "the system wrote nothing")
    return count
