"""Read from a file: through the system's page cache what it holds, past it what it doesn't.

A direct read takes none of the processor's time but for one copy, which a
reader of encoded bytes doesn't need either.  It needs an aligned place in
memory, and leaves nothing in the cache.
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

# To ask for every page takes as long as to copy some of them.
_SAMPLES = 8

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
    """Bytes of a file that the system hasn't cached, somewhere in `room`.

    None if it has, if they and the pages that they lie in don't fit the room,
    if the file ends before, or if the file system refuses or fails: then an
    ordinary read is the way, or says what is wrong.
    """
    ahead = offset % ALIGNMENT
    begin = -room.__array_interface__["data"][0] % ALIGNMENT
    nbytes = -(-(ahead + length) // ALIGNMENT) * ALIGNMENT
    if begin + nbytes > room.size:
        return None
    try:
        if is_cached(descriptor, offset, length):
            # Pages that the system would read ahead would seem cached to the next who asks.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
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


def is_cached(descriptor: int, offset: int, length: int) -> bool:
    """Whether the system has cached a good deal of a part of a file, which isn't empty.

    By a sample.  Maps the file, but reads nothing there.  True if the system
    doesn't tell.  Raises `OSError`, or `ValueError` if the file ends before.
    """
    begin = offset - offset % mmap.ALLOCATIONGRANULARITY
    nbytes = offset + length - begin
    step = max(nbytes // _SAMPLES // mmap.PAGESIZE, 1) * mmap.PAGESIZE
    with mmap.mmap(descriptor, nbytes, prot=mmap.PROT_READ, offset=begin) as pages:
        address = np.frombuffer(pages, np.uint8).__array_interface__["data"][0]
        seen = ctypes.c_ubyte()
        cached = 0
        for at in range(0, nbytes, step):
            refused = _mincore(address + at, 1, ctypes.byref(seen))
            cached += refused != 0 or seen.value & 1
    # A page is copied from the cache ten times as fast as it comes from a disk.
    return cached > 1 or step * cached >= nbytes
