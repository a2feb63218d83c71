"""Encode and decode chunks: split into planes, each a zstd frame or as it is.

A chunk none of whose planes gets smaller stays one plane, unsplit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from gpuckpt.arena import Slot
from gpuckpt.errors import CorruptError
from gpuckpt.planes import join, split
from gpuckpt.spec import Plane

Bytes = npt.NDArray[np.uint8]
Choice = Callable[[Sequence[Bytes]], Sequence[bool]]

# A plane is compressed if a sample promises less than this share of its bytes,
# and kept compressed if the frame is smaller than this share.
WORTHWHILE = 0.97
SAMPLE = 4096
# A smaller chunk's samples and frames cost more time than its bytes: thousands of biases and
# norms are a thousandth of a model.
FEWEST_NBYTES = 16 << 10


@dataclass(frozen=True, slots=True)
class Encoded:
    """A chunk's bytes for the disk: one part for each plane, all in its slot's memory."""

    planes: tuple[Plane, ...]
    parts: tuple[memoryview, ...]


def encode(given: Sequence[Bytes], width: int, slot: Slot, choose: Choice) -> Encoded:
    """Encode a chunk of elements of `width` bytes; `choose` says which planes to compress.

    `given` are its planes, or its raw bytes alone.  Uses the slot's `coded`
    and what else of the slot `given` doesn't lie in: `planes` for raw bytes,
    `raw` for planes.  `given` stays the owner of what is not compressed.
    """
    whole = given[0] if len(given) == 1 else None
    tries = choose(given if whole is None else columns(whole, width))
    if any(tries):
        planes = given if whole is None else _split(whole, width, slot)
        encoded = _encode_planes(planes, tries, slot)
        if any(plane.codec != "raw" for plane in encoded.planes):
            return encoded
    if whole is None:
        whole = slot.raw[: sum(plane.size for plane in given)]
        join(given, whole)
    return Encoded((Plane("raw", whole.size),), (whole.data,))


def decode(
    coded: Bytes, planes: Sequence[Plane], slot: Slot, rooms: Sequence[Bytes], where: str
) -> None:
    """Decode the bytes that `planes` describe into `rooms`: undoes `encode`.

    Into a room for each plane or, if there is only one room, joined; then
    uses the slot's `planes`.

    Raises:
        CorruptError: a frame isn't what the plane's length and its room
            promise; nothing is allocated for it.
    """
    if len(rooms) == len(planes):
        decode_planes(coded, planes, slot, rooms, where)
        return
    (out,) = rooms
    parts = []
    for plane, room in zip(planes, slot.planes[: out.size].reshape(len(planes), -1), strict=True):
        part, coded = coded[: plane.length], coded[plane.length :]
        if plane.codec == "raw" and part.size == room.size:
            parts.append(part)
        else:
            decode_planes(part, [plane], slot, [room], where)
            parts.append(room)
    join(parts, out)


def choose_nothing(planes: Sequence[Bytes]) -> Sequence[bool]:
    """Leave every plane as it is."""
    return [False] * len(planes)


def choose_all(planes: Sequence[Bytes]) -> Sequence[bool]:
    """Try every plane."""
    return [True] * len(planes)


def choose_by_entropy(planes: Sequence[Bytes]) -> Sequence[bool]:
    """Try the planes whose sampled order-0 entropy promises a worthwhile gain."""
    if sum(plane.size for plane in planes) < FEWEST_NBYTES:
        return [False] * len(planes)
    return [sample_entropy(plane) < 8 * WORTHWHILE for plane in planes]


def sample_entropy(plane: Bytes) -> float:
    """Bits per byte of a plane (which may be strided), from a sample at even distances.

    With Miller and Madow's correction for a sample's bias ("Note on the bias
    of information estimates", 1955), which at 4,096 of 256 symbols is 0.04 bits.
    """
    return entropy(np.bincount(plane[:: max(plane.size // SAMPLE, 1)], minlength=256))


def entropy(counts: npt.NDArray[np.integer[Any]]) -> float:
    """Bits per byte of a sample which has so many of each value, corrected for its bias.

    By Miller and Madow, as `sample_entropy` says.
    """
    counts = counts[counts > 0].astype(np.int64)
    count = int(counts.sum())
    bits = np.log2(count) - float(counts @ np.log2(counts)) / count
    return float(bits + (len(counts) - 1) / (2 * count) * np.log2(np.e))


def columns(raw: Bytes, width: int) -> list[Bytes]:
    """Byte k of every element, where it lies."""
    elements = raw.reshape(-1, width)
    return [elements[:, k] for k in range(width)]


def _split(raw: Bytes, width: int, slot: Slot) -> Sequence[Bytes]:
    return [raw] if width == 1 else split(raw, width, slot.planes)


def _encode_planes(planes: Sequence[Bytes], tries: Sequence[bool], slot: Slot) -> Encoded:
    coded, parts, entries = slot.coded, [], []
    for plane, worth_trying in zip(planes, tries, strict=True):
        length = compress(plane, coded, slot.compressor) if worth_trying else 0
        entries.append(Plane("zstd", length) if length else Plane("raw", plane.size))
        parts.append(coded[:length].data if length else plane.data)
        coded = coded[length:]
    return Encoded(tuple(entries), tuple(parts))


def decode_planes(
    coded: Bytes, planes: Sequence[Plane], slot: Slot, rooms: Sequence[Bytes], where: str
) -> None:
    """Decode each of `planes`, which lie one after the other, into its room."""
    for plane, room in zip(planes, rooms, strict=True):
        part, coded = coded[: plane.length], coded[plane.length :]
        if plane.codec == "zstd":
            _decompress(part, room, slot.decompressor, where)
        elif part.size != room.size:
            raise CorruptError(where, f"{part.size} bytes where {room.size} belong")
        else:
            np.copyto(room, part)


def compress(plane: Bytes, room: Bytes, compressor: zstandard.ZstdCompressor) -> int:
    """Write a frame to `room`; its length, or 0 if that isn't worthwhile."""
    limit = min(int(plane.size * WORTHWHILE), room.size)
    reader = compressor.stream_reader(plane.data, size=plane.size)
    length: int = reader.readinto(room[:limit].data) if limit else 0
    return length if length < limit else 0


def _decompress(
    frame: Bytes, room: Bytes, decompressor: zstandard.ZstdDecompressor, where: str
) -> None:
    try:
        declared = zstandard.frame_content_size(frame.data)
        if declared != room.size:
            raise CorruptError(where, f"a frame of {declared} bytes where {room.size} belong")
        reader = decompressor.stream_reader(frame.data)
        found = reader.readinto(room.data) if room.size else 0
    except zstandard.ZstdError as error:
        raise CorruptError(where, f"not a zstd frame ({error})") from error
    if found != room.size:
        raise CorruptError(where, f"a frame ends after {found} of {room.size} bytes")
