"""How much room a file system has left."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

# Those that store what they are given, byte for byte: ext2 to 4, XFS, tmpfs.  Others may compress
# it, or lie on a server whose disks do, so that what is left says nothing of what fits.
_PLAIN = frozenset({0xEF53, 0x58465342, 0x01021994})
# More than any system's `struct statfs`, which begins with the file system's kind.
_STATFS_NBYTES = 512


def free_nbytes(path: Path) -> int | None:
    """Bytes below `path` more of which surely don't fit; None where that isn't known.

    What is reserved for root counts for root.  Raises the system's `OSError`.
    """
    place = next(one for one in (path, *path.parents) if one.exists())
    found = os.statvfs(place)
    if not found.f_blocks or _kind(place) not in _PLAIN:
        return None
    return found.f_frsize * (found.f_bfree if os.geteuid() == 0 else found.f_bavail)


def _kind(path: Path) -> int:
    """The number by which the kernel knows a kind of file systems."""
    room = ctypes.create_string_buffer(_STATFS_NBYTES)
    if ctypes.CDLL(None, use_errno=True).statfs(os.fsencode(path), room):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    word = room.raw[: ctypes.sizeof(ctypes.c_long)]
    return int.from_bytes(word, sys.byteorder) & 0xFFFFFFFF
