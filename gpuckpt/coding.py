"""Encode and decode chunks: split into planes, each a zstd frame or as it is.

A chunk none of whose planes gets smaller stays one plane, unsplit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import zstandard

from gpuckpt.arena import WINDOW_NBYTES_MAX, Slot
from gpuckpt.errors import CorruptError
from gpuckpt.layout import LEAF_NBYTES
from gpuckpt.native import Native, native_for
from gpuckpt.planes import join, join_in_parts, split, turn
from gpuckpt.record import record
from gpuckpt.spec import Ends, Plane
from gpuckpt.tileindex import BLOCKS

Bytes = npt.NDArray[np.uint8]
Kind = TypeVar("Kind", bound=np.generic)
# Of planes, or of samples of them, and of how many bytes the chunk has: which to compress.
Choice = Callable[[Sequence[Bytes], int], Sequence[bool]]
Note = Callable[[memoryview], object]

# A plane is compressed if a sample promises less than this share of its bytes,
# and kept compressed if the frame is smaller than this share.
WORTHWHILE = 0.97
SAMPLE = 4096
_RUN_NBYTES = 64
# A plane with more runs, as a share of the places that are looked at, is left to zstd, which finds
# matches; where there are none, looking for them costs bytes and time.
RUNS = 0.03
# A smaller chunk's samples and frames cost more time than its bytes: thousands of biases and
# norms are a thousandth of a model.
FEWEST_NBYTES = 16 << 10
# Elements that are joined at a time: they stay in a core's own cache, and are whole leaves.
_JOINED = LEAF_NBYTES


@record(frozen=True, slots=True)
class Encoded:
    """A chunk's bytes for the disk: one part for each plane, all in its slot's memory.

    `turned` says whether the planes are of elements that are.  With `tiles`, the
    last part is their index.
    """

    planes: tuple[Plane, ...]
    parts: tuple[memoryview, ...]
    turned: bool = False
    tiles: Ends = ()


def encode(
    given: Sequence[Bytes], width: int, slot: Slot, choose: Choice, *, turned: bool = False
) -> Encoded:
    """Encode a chunk of elements of `width` bytes; `choose` says which planes to compress.

    `given` are its planes, or its raw bytes alone; `turned` says whether planes
    are, or shall be, of elements that are turned.  Uses the slot's `coded`
    and what else of the slot `given` doesn't lie in: `planes` for raw bytes,
    `raw` for planes.  `given` stays the owner of what is not compressed.
    """
    whole = given[0] if len(given) == 1 else None
    nbytes = sum(plane.size for plane in given)
    tries = choose_planes(given, width, choose, turned=turned)
    if any(tries):
        planes = given
        if whole is not None and width > 1:
            planes = split(whole, width, slot.planes, turned=turned)
        encoded = _encode_planes(planes, tries, slot, turned=turned)
        if any(plane.codec != "raw" for plane in encoded.planes):
            return encoded
    if whole is None:
        whole = slot.raw[:nbytes]
        join(given, whole, turned=turned)
    return Encoded((Plane("raw", whole.size),), (whole.data,))


def choose_planes(
    given: Sequence[Bytes], width: int, choose: Choice, *, turned: bool = False
) -> Sequence[bool]:
    """Which planes of a chunk to compress, which is given as `encode` takes it."""
    nbytes = sum(plane.size for plane in given)
    if len(given) > 1:
        return choose([_some(plane, width) for plane in given], nbytes)
    return choose(Samples(given[0], width, turned=turned), nbytes)


def encode_chosen(
    whole: Bytes,
    planes: Sequence[Bytes],
    tries: Sequence[bool],
    slot: Slot,
    *,
    turned: bool = False,
) -> Encoded:
    """As `encode`, where planes were chosen and, if there are any to be tried, split already.

    `whole` is the chunk as it is; `turned` says whether the planes are; frames
    go to the slot's `coded`.
    """
    if any(tries):
        encoded = _encode_planes(planes, tries, slot, turned=turned)
        if any(plane.codec != "raw" for plane in encoded.planes):
            return encoded
    return Encoded((Plane("raw", whole.size),), (whole.data,))


def decode(
    coded: Bytes,
    planes: Sequence[Plane],
    slot: Slot,
    rooms: Sequence[Bytes],
    where: str,
    *,
    turned: bool = False,
    note: Note = lambda _: None,
) -> None:
    """Decode the bytes that `planes` describe into `rooms`: undoes `encode`.

    Into a room for each plane or, if there is only one room, joined, and
    turned back if they are `turned`; then uses the slot's `planes`, and `note`
    is told of each part of the room in turn once it is filled: it is still in
    the processor's cache.

    Raises:
        CorruptError: a frame isn't what the plane's length and its room
            promise; nothing is allocated for it.
    """
    if len(rooms) == len(planes):
        decode_planes(coded, planes, slot, rooms, where)
        if len(rooms) == 1:
            note(rooms[0].data)
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
    for joined in join_in_parts(parts, out, _JOINED, turned=turned):
        note(joined.data)


def choose_nothing(planes: Sequence[Bytes], _nbytes: int) -> Sequence[bool]:
    """Leave every plane as it is."""
    return [False] * len(planes)


def choose_all(planes: Sequence[Bytes], _nbytes: int) -> Sequence[bool]:
    """Try every plane."""
    return [True] * len(planes)


def choose_by_entropy(planes: Sequence[Bytes], nbytes: int) -> Sequence[bool]:
    """Try the planes whose sampled order-0 entropy promises a worthwhile gain."""
    if nbytes < FEWEST_NBYTES:
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


class Samples(Sequence[Bytes]):
    """Of the planes of a chunk, as `sample_entropy` would look at them: taken at the first look.

    Runs of 64 bytes at even distances: each is a cache line, which takes as long as one element.
    """

    def __init__(self, raw: Bytes, width: int, *, turned: bool = False) -> None:
        """`width` is 1, 2, 4 or 8."""
        self._raw, self._width, self._turned = raw, width, turned

    def __len__(self) -> int:
        return self._width

    def __getitem__(self, at: Any) -> Any:
        return self._planes[at]

    @cached_property
    def _planes(self) -> list[Bytes]:
        some = _some(self._raw.view(f"<u{self._width}"), self._width)
        some = turn(some) if self._turned else some
        return columns(some.view(np.uint8), self._width)


def _some(elements: npt.NDArray[Kind], width: int) -> npt.NDArray[Kind]:
    """Runs of elements of `width` bytes, or of a plane's bytes: the same of either."""
    run = _RUN_NBYTES // width
    rows = elements[: elements.size // run * run].reshape(-1, run)
    step = len(rows) // (SAMPLE // run)
    return rows[::step].reshape(-1) if step else elements


def _encode_planes(
    planes: Sequence[Bytes], tries: Sequence[bool], slot: Slot, *, turned: bool
) -> Encoded:
    coded, parts, entries = slot.coded, [], []
    for plane, worth_trying in zip(planes, tries, strict=True):
        length = compress(plane, coded, slot.compressor) if worth_trying else 0
        entries.append(Plane("zstd", length) if length else Plane("raw", plane.size))
        parts.append(coded[:length].data if length else plane.data)
        coded = coded[length:]
    return Encoded(tuple(entries), tuple(parts), turned)


def decode_planes(
    coded: Bytes, planes: Sequence[Plane], slot: Slot, rooms: Sequence[Bytes], where: str
) -> None:
    """Decode each of `planes`, which lie one after the other, into its room."""
    for plane, room in zip(planes, rooms, strict=True):
        part, coded = coded[: plane.length], coded[plane.length :]
        if plane.codec in {"zstd", BLOCKS}:
            _decompress(part, room, slot.decompressor, where)
        elif part.size != room.size:
            raise CorruptError(where, f"{part.size} bytes where {room.size} belong")
        else:
            np.copyto(room, part)


def compress(plane: Bytes, room: Bytes, compressor: zstandard.ZstdCompressor) -> int:
    """Write a frame to `room`; its length, or 0 if that isn't worthwhile."""
    room = room[: min(int(plane.size * WORTHWHILE), room.size)]
    loops = native_for(1, plane, room)
    if loops is not None and not is_in_runs(plane, loops):
        return loops.huffman(plane, room)
    reader = compressor.stream_reader(plane.data, size=plane.size)
    length: int = reader.readinto(room.data) if room.size else 0
    return length if length < room.size else 0


def is_in_runs(plane: Bytes, loops: Native) -> bool:
    """Whether enough of a plane are runs that matches gain more than they cost."""
    return 256 * loops.count_runs(plane) >= RUNS * plane.size


def _decompress(
    frame: Bytes, room: Bytes, decompressor: zstandard.ZstdDecompressor, where: str
) -> None:
    try:
        declared = zstandard.frame_content_size(frame.data)
        if declared != room.size:
            raise CorruptError(where, f"a frame of {declared} bytes where {room.size} belong")
        window = zstandard.get_frame_parameters(frame.data).window_size
        if window > max(WINDOW_NBYTES_MAX, room.size):
            raise CorruptError(where, f"a frame with a window of {window} bytes")
        reader = decompressor.stream_reader(frame.data, read_across_frames=True)
        found = reader.readinto(room.data) if room.size else 0
        found += len(reader.read(1))  # of a second frame
    except zstandard.ZstdError as error:
        raise CorruptError(where, f"not a zstd frame ({error})") from error
    if found != room.size:
        raise CorruptError(where, f"frames of {found} bytes or more where {room.size} belong")
