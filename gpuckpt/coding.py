"""Encode and decode chunks: split into planes, each a zstd frame or as it is.

A chunk none of whose planes gets smaller stays one plane, unsplit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import zstandard

from gpuckpt.arena import Slot
from gpuckpt.errors import CorruptError
from gpuckpt.planes import join, split
from gpuckpt.spec import Plane

Bytes = npt.NDArray[np.uint8]
Choice = Callable[[Bytes, int], Sequence[bool]]

# A plane is compressed if a sample promises less than this share of its bytes,
# and kept compressed if the frame is smaller than this share.
WORTHWHILE = 0.97
SAMPLE = 4096
# Below this a frame's header and the call cost more than is saved.
FEWEST_NBYTES = 512


@dataclass(frozen=True, slots=True)
class Encoded:
    """A chunk's bytes for the disk: one part for each plane, all in its slot's memory."""

    planes: tuple[Plane, ...]
    parts: tuple[memoryview, ...]


def encode(raw: Bytes, width: int, slot: Slot, choose: Choice) -> Encoded:
    """Encode `raw`, elements of `width` planes; `choose` says which planes to try to compress.

    Uses the slot's `planes` and `coded`; `raw` may be the slot's or not, and
    stays the owner of what is not compressed.
    """
    tries = choose(raw, width)
    if not any(tries):
        return Encoded((Plane("raw", raw.size),), (raw.data,))
    planes = [raw] if width == 1 else split(raw, width, slot.planes)
    coded, parts, entries = slot.coded, [], []
    for plane, worth_trying in zip(planes, tries, strict=True):
        length = _compress(plane, coded, slot.compressor) if worth_trying else 0
        entries.append(Plane("zstd", length) if length else Plane("raw", plane.size))
        parts.append(coded[:length].data if length else plane.data)
        coded = coded[length:]
    if all(entry.codec == "raw" for entry in entries):
        return Encoded((Plane("raw", raw.size),), (raw.data,))
    return Encoded(tuple(entries), tuple(parts))


def decode(coded: Bytes, planes: Sequence[Plane], slot: Slot, out: Bytes, where: str) -> None:
    """Decode the bytes that `planes` describe into `out`: undoes `encode`.

    Uses the slot's `planes`.

    Raises:
        CorruptError: a frame isn't what the plane's length and `out` promise;
            nothing is allocated for it.
    """
    count = out.size // len(planes)
    whole, decoded, offset = len(planes) == 1, [], 0
    for k, plane in enumerate(planes):
        part = coded[offset : offset + plane.length]
        offset += plane.length
        if plane.codec == "zstd":
            room = out if whole else slot.planes[k * count : (k + 1) * count]
            _decompress(part, room, slot.decompressor, where)
            part = room
        decoded.append(part)
    if not whole:
        join(decoded, out)
    elif decoded[0] is not out:
        np.copyto(out, decoded[0])


def choose_nothing(raw: Bytes, width: int) -> Sequence[bool]:  # noqa: ARG001
    """Leave every plane as it is."""
    return [False] * width


def choose_by_entropy(raw: Bytes, width: int) -> Sequence[bool]:
    """Try the planes whose sampled order-0 entropy promises a worthwhile gain."""
    if raw.size < FEWEST_NBYTES:
        return [False] * width
    return [bits < 8 * WORTHWHILE for bits in sample_entropy(raw, width)]


def sample_entropy(raw: Bytes, width: int) -> list[float]:
    """Bits per byte of each plane, from a strided sample of its elements.

    With Miller and Madow's correction for a sample's bias ("Note on the bias
    of information estimates", 1955), which at 4,096 of 256 symbols is 0.04 bits.
    """
    elements = raw.reshape(-1, width)
    sample = elements[:: max(len(elements) // SAMPLE, 1)]
    count = len(sample)
    entropies = []
    for k in range(width):
        counts = np.bincount(sample[:, k], minlength=256)
        counts = counts[counts > 0]
        bits = np.log2(count) - float(counts @ np.log2(counts)) / count
        entropies.append(float(bits + (len(counts) - 1) / (2 * count) * np.log2(np.e)))
    return entropies


def _compress(plane: Bytes, room: Bytes, compressor: zstandard.ZstdCompressor) -> int:
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
