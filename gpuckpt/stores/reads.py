"""Read from a file: through the system's page cache what it holds, past it what it doesn't.

A direct read keeps the disk busier and takes less of the processor's time, but
leaves nothing in the cache for other processes that read the same, or for the
next time.  So it leaves a mark there, one page; and who finds it alone brings
the rest to the cache.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os

import numpy as np
import numpy.typing as npt

from gpuckpt.stores.blocks import ALIGNMENT, set_direct

log = logging.getLogger("gpuckpt")

Bytes = npt.NDArray[np.uint8]

# Fewer bytes come as fast through the cache.
FEWEST_NBYTES = 256 << 10

_mincore = ctypes.CDLL(None).mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_mincore.restype = ctypes.c_int


def read_some(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` as far as the file goes; how many bytes that is."""
    done = 0
    while done < buffer.nbytes:
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            break
        done += count
    return done


def read_direct(descriptor: int, offset: int, length: int, room: Bytes) -> Bytes | None:
    """Bytes of a file that nobody has read lately, somewhere in `room`.

    None if somebody has, if they are few, if they and the pages that they lie
    in don't fit the room, if the file ends before, or if the file system
    refuses or fails: then an ordinary read is the way, or says what is wrong.
    """
    ahead = offset % ALIGNMENT
    begin = -room.__array_interface__["data"][0] % ALIGNMENT
    nbytes = -(-(ahead + length) // ALIGNMENT) * ALIGNMENT
    if length < FEWEST_NBYTES or begin + nbytes > room.size:
        return None
    try:
        if not _leave_mark(descriptor, offset, length):
            return None
        set_direct(descriptor, on=True)
        try:
            found = read_some(descriptor, room[begin : begin + nbytes].data, offset - ahead)
        finally:
            set_direct(descriptor, on=False)
    except (OSError, ValueError) as error:
        log.debug("read through the page cache: %s", error)
        return None
    return room[begin + ahead :][:length] if found >= ahead + length else None


def _leave_mark(descriptor: int, offset: int, length: int) -> bool:
    """Bring a page in the middle to the cache, unless it is there; then, all if the first isn't."""
    middle = offset + length // 2
    first, mark = are_cached(descriptor, offset, [0, length // 2])
    if not mark:
        os.posix_fadvise(descriptor, middle, 1, os.POSIX_FADV_WILLNEED)
        return True
    # What is read ahead, beyond these bytes, would be a mark that nobody has left.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    if not first:
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)
    return False


def are_cached(descriptor: int, offset: int, places: list[int]) -> list[bool]:
    """Whether the system has cached the pages of a file at some places, in order, from `offset` on.

    Maps the file, but reads nothing there.  All if the system doesn't tell.
    Raises `OSError`, or `ValueError` if the file ends before.
    """
    begin = offset - offset % mmap.ALLOCATIONGRANULARITY
    ahead = offset - begin
    nbytes = ahead + places[-1] + 1
    seen = ctypes.c_ubyte()
    found = []
    with mmap.mmap(descriptor, nbytes, prot=mmap.PROT_READ, offset=begin) as pages:
        address = np.frombuffer(pages, np.uint8).__array_interface__["data"][0]
        for place in places:
            at = ahead + place
            refused = _mincore(address + at - at % mmap.PAGESIZE, 1, ctypes.byref(seen))
            found.append(refused != 0 or bool(seen.value & 1))
    return found
