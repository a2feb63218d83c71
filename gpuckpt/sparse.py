"""Planes of which most bytes are zero: which ones aren't, and these alone.

Bit i % 8 (from the lowest) of a bitmap's byte i // 8 is set if byte i of the
plane isn't zero; the bytes that aren't follow each other in the plane's order.

By the compiled loops where they are, else by numpy.  numpy's version is the
reference: whatever else does it gives the same bytes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gpuckpt.native import native_for

Bytes = npt.NDArray[np.uint8]

# Huffman spends a bit on each byte at least, and zstd's search finds runs of zeros that it codes
# worse than Huffman would: a plane of which no more than this share isn't zero is packed first.
# Above, that gains nothing (ADR 0030).
SPARSE_SHARE = 0.6
# Below this two frames' headers and the calls cost more than is saved.
FEWEST_NBYTES = 512
# Bytes of a plane done at a time: they stay in a core's cache, and fill whole bytes of a bitmap.
_BLOCK = 1 << 16


def bitmap_nbytes(size: int) -> int:
    """Bytes of the bitmap of a plane of `size` bytes."""
    return (size + 7) // 8


def is_sparse(count: int, size: int) -> bool:
    """Whether a plane of `size` bytes, `count` of which aren't zero, is packed."""
    return size >= FEWEST_NBYTES and count <= SPARSE_SHARE * size


def count_nonzero(plane: Bytes) -> int:
    """How many bytes of a plane aren't zero."""
    loops = native_for(1, plane)
    return loops.count_nonzero(plane) if loops else int(np.count_nonzero(plane))


def pack_sparse(plane: Bytes, bitmap: Bytes, packed: Bytes) -> int:
    """Write a plane's bitmap, and its bytes that aren't zero to the head of `packed`; their number.

    All are contiguous, at any address, and overlap nowhere.  `bitmap` has
    `bitmap_nbytes(plane.size)` bytes, of which the last one's spare bits
    become zero.  `packed` has room for as many as aren't zero; `plane.size`
    bytes are always enough.  What lies behind them may be overwritten.
    """
    assert bitmap.size == bitmap_nbytes(plane.size), (bitmap.size, plane.size)
    loops = native_for(1, plane, bitmap, packed)
    pack = loops.pack_sparse if loops else pack_sparse_by_numpy
    count = pack(plane, bitmap, packed)
    assert count <= packed.size, (count, packed.size)
    return count


def unpack_sparse(bitmap: Bytes, packed: Bytes, out: Bytes) -> bool:
    """Write the plane that `pack_sparse` packed; False if these can't be of a plane of that size.

    They can't if the bitmap has another length, sets a bit behind the plane's
    end, or sets more or fewer bits than `packed` has bytes.  `out` then holds
    anything.  A packed byte that is zero is taken as it is.
    """
    if bitmap.size != bitmap_nbytes(out.size):
        return False
    loops = native_for(1, out, bitmap, packed)
    unpack = loops.unpack_sparse if loops else unpack_sparse_by_numpy
    return unpack(bitmap, packed, out)


def pack_sparse_by_numpy(plane: Bytes, bitmap: Bytes, packed: Bytes) -> int:
    """What `pack_sparse` does; more than there is room for is counted, but not written."""
    count = 0
    for at in range(0, plane.size, _BLOCK):
        some = plane[at : at + _BLOCK]
        mask = some != 0
        bits = np.packbits(mask, bitorder="little")
        bitmap[at // 8 : at // 8 + bits.size] = bits
        found = some[mask]
        room = packed[count : count + found.size]
        room[...] = found[: room.size]
        count += found.size
    return count


def unpack_sparse_by_numpy(bitmap: Bytes, packed: Bytes, out: Bytes) -> bool:
    """What `unpack_sparse` does; `bitmap` has the length that it should have."""
    count = 0
    for at in range(0, out.size, _BLOCK):
        some = out[at : at + _BLOCK]
        bits = np.unpackbits(bitmap[at // 8 : (at + _BLOCK) // 8], bitorder="little")
        mask = bits[: some.size].astype(np.bool_)
        found = int(np.count_nonzero(bits))
        if count + found > packed.size or bits[some.size :].any():
            return False
        some[...] = 0
        some[mask] = packed[count : count + found]
        count += found
    return count == packed.size
