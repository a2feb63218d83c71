"""Encode what a chunk differs from its base by, and chunks of which planes are mostly zero.

The bound is the planes' order-0 entropy, as in `coding`; but Huffman's code
spends a bit on each byte at least, so of a plane that is mostly zero only the
bytes that aren't are coded, after a bitmap that says which these are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import zstandard

from gpuckpt.arena import Slot
from gpuckpt.coding import (
    SAMPLE,
    WORTHWHILE,
    Encoded,
    columns,
    compress,
    decode_planes,
    entropy,
    sample_entropy,
)
from gpuckpt.deltas import delta, delta_split, join_undelta
from gpuckpt.devices import Folded, Histograms
from gpuckpt.entries import SPARSE
from gpuckpt.errors import CorruptError
from gpuckpt.planes import join
from gpuckpt.sparse import bitmap_nbytes, count_nonzero, is_sparse, pack_sparse, unpack_sparse
from gpuckpt.spec import Plane

Bytes = npt.NDArray[np.uint8]

# A delta is taken if a sample promises less than this share of what the chunk itself takes.
DELTA_WORTHWHILE = 0.95


def encode_delta(raw: Bytes, base: Bytes, width: int, slot: Slot, spare: Slot) -> Encoded:
    """Encode a chunk by what it differs from its base by, into the slot's `coded`.

    Both are its raw bytes; `spare` is used up meanwhile.
    """
    planes = delta_split(raw, base, width, spare.planes[: raw.size])
    return _encode_each(planes, slot, spare.raw)


def encode_folded(planes: Sequence[Folded], slot: Slot) -> Encoded:
    """As `encode_delta`, of planes of differences that a device took, some packed already."""
    return _encode_each(planes, slot, None)


def _encode_each(planes: Sequence[Folded], slot: Slot, scratch: Bytes | None) -> Encoded:
    coded, entries = slot.coded, []
    for plane in planes:
        packed = plane if isinstance(plane, tuple) else _packed(plane, scratch)
        if isinstance(packed, tuple):
            entry = _encode_packed(packed, coded, slot.compressor)
        else:
            entry = _encode_plane(packed, coded, slot.compressor)
        entries.append(entry)
        coded = coded[entry.length :]
    whole = slot.coded[: sum(entry.length for entry in entries)]
    return Encoded(tuple(entries), (whole.data,))


def _packed(plane: Bytes, scratch: Bytes | None) -> Folded:
    """A plane's bitmap and its bytes that aren't zero, if few aren't, in `scratch`."""
    if scratch is None:
        return plane
    count = count_nonzero(plane)
    if not is_sparse(count, plane.size):
        return plane
    end = bitmap_nbytes(plane.size)
    bitmap, packed = scratch[:end], scratch[end : end + count]
    pack_sparse(plane, bitmap, packed)
    return bitmap, packed


def decode_delta(
    coded: Bytes,
    planes: Sequence[Plane],
    spare: Slot,
    out: Bytes,
    *,
    base: Bytes | None,
    where: str,
    turned: bool = False,
) -> None:
    """Decode what a chunk differs from its base by, and add it: undoes `encode_delta`.

    `out` may be `base`; without one, decodes a chunk of which planes are packed, and may
    be `turned`.
    `coded` isn't in `spare`'s `planes` and `raw`, which are used up.

    Raises:
        CorruptError: as `decode`.
    """
    rooms = list(spare.planes[: out.size].reshape(len(planes), -1))
    for plane, room in zip(planes, rooms, strict=True):
        part, coded = coded[: plane.length], coded[plane.length :]
        if plane.parts:
            _decode_sparse(part, plane, room, spare, where)
        else:
            decode_planes(part, [plane], spare, [room], where)
    if base is None:
        join(rooms, out, turned=turned)
    else:
        join_undelta(rooms, base, len(planes), out)


def delta_pays(raw: Bytes, base: Bytes, width: int) -> tuple[bool, float]:
    """Whether a delta takes clearly less than the chunk itself, and the share that it would take.

    By a sample of both, as `choose_by_entropy`.
    """
    kind = np.dtype(f"<u{width}")
    step = max(raw.size // width // SAMPLE, 1)
    some, before = (np.ascontiguousarray(data.view(kind)[::step]) for data in (raw, base))
    own, other = some.view(np.uint8), before.view(np.uint8)
    folded = np.empty_like(own)
    delta(own, other, width, folded)
    full, less = (
        _share([sample_entropy(column) for column in columns(data, width)])
        for data in (own, folded)
    )
    return less < DELTA_WORTHWHILE * full, less


def histograms_pay(histograms: Histograms) -> tuple[bool, float]:
    """As `delta_pays`, from the histograms that a device took of the same sample."""
    full, less = (_share([entropy(counts) for counts in side]) for side in histograms)
    return less < DELTA_WORTHWHILE * full, less


def _share(entropies: Sequence[float]) -> float:
    return sum(min(bits, 8.0) for bits in entropies) / (8 * len(entropies))


def _encode_plane(plane: Bytes, room: Bytes, compressor: zstandard.ZstdCompressor) -> Plane:
    """Write a plane to `room`, in the way that promises the fewest bytes."""
    length = 0
    if sample_entropy(plane) < 8 * WORTHWHILE:
        length = compress(plane, room, compressor)
    if length:
        return Plane("zstd", length)
    np.copyto(room[: plane.size], plane)
    return Plane("raw", plane.size)


def _encode_packed(
    packed: tuple[Bytes, Bytes], room: Bytes, compressor: zstandard.ZstdCompressor
) -> Plane:
    """Write a plane's bitmap and its bytes that aren't zero."""
    parts = []
    for part in packed:
        length = compress(part, room, compressor)
        if not length:
            np.copyto(room[: part.size], part)
        parts.append(Plane("zstd", length) if length else Plane("raw", part.size))
        room = room[parts[-1].length :]
    return Plane(SPARSE, sum(part.length for part in parts), tuple(parts))


def _decode_sparse(coded: Bytes, plane: Plane, room: Bytes, spare: Slot, where: str) -> None:
    first, second = plane.parts
    end = bitmap_nbytes(room.size)
    bitmap = spare.raw[:end]
    decode_planes(coded[: first.length], [first], spare, [bitmap], where)
    frame = coded[first.length :]
    count = second.length if second.codec == "raw" else _declared(frame, where)
    if not 0 <= count <= room.size - end:
        raise CorruptError(where, f"a sparse plane of {count} bytes for {room.size}")
    packed = spare.raw[end : end + count]
    decode_planes(frame, [second], spare, [packed], where)
    if not unpack_sparse(bitmap, packed, room):
        raise CorruptError(where, "a sparse plane's bitmap doesn't fit its bytes")


def _declared(frame: Bytes, where: str) -> int:
    try:
        return int(zstandard.frame_content_size(frame.data))
    except zstandard.ZstdError as error:
        raise CorruptError(where, f"not a zstd frame ({error})") from error
