"""Tables of chunks and their copies before: `survey`, `sample` and `pack` of the kernels.

Pure arithmetic.  Addresses are of memory on the device, of regions that begin at
multiples of 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuckpt.devices import Folded, Histograms
from gpuckpt.devices.merging import Span
from gpuckpt.sparse import bitmap_nbytes, is_sparse

Bytes = npt.NDArray[np.uint8]
Rows = npt.NDArray[Any]

# As in kernels/pairs.cuh: elements that a warp takes, and those that a block takes.
SEGMENT = 4096
PIECE = 8 * SEGMENT
# A row of the kernels' table: `struct Pair` of kernels/pairs.cuh, byte for byte.
PAIR = np.dtype(
    [
        *((name, "<u8") for name in ("now", "before", "count", "stride", "first_piece")),
        *((name, "<u8") for name in ("found", "histograms")),
        *((name, "<u4") for name in ("width", "every")),
        ("out", "<u8", 8),
        *((name, "<u8") for name in ("sparse", "turned")),
    ]
)
# Elements of a chunk that are looked at to see whether its delta pays; as many or nearly twice.
SAMPLE = 4096
_VALUES = 256
# Of a segment's bitmap; and in its place, if there is none.
_BITMAP_NBYTES = SEGMENT // 8
_NONE = 2**32 - 1

Counts = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Survey:
    """Rows for `survey` and `sample` over chunks and their copies before, of so many pieces.

    `nbytes` are those of the rows and, behind them, of all that is said of
    them: for each its counts, then its histograms.
    """

    rows: Rows
    pieces: int
    nbytes: int

    def counts(self, data: Bytes, row: int) -> Counts:
        """Of a row's segments and planes, the bytes that aren't zero: uint32[segments, width].

        `data` is what is behind the rows.
        """
        width = int(self.rows["width"][row])
        start = int(self.rows["found"][row] - self.rows["found"][0])
        found = data[start:][: 4 * width * -(-int(self.rows["count"][row]) // SEGMENT)]
        return found.view(np.uint32).reshape(-1, width)

    def histograms(self, data: Bytes, row: int) -> Histograms:
        """Of a row's sampled bytes: uint16[2, width, 256], as they are and of differences.

        `data` is what is behind the rows.
        """
        width = int(self.rows["width"][row])
        start = int(self.rows["histograms"][row] - self.rows["found"][0])
        found = data[start:][: _histograms_nbytes(width)]
        return found.view(np.uint16).reshape(2, width, _VALUES)


@dataclass(frozen=True, slots=True)
class Packing:
    """Rows for `pack`, of so many pieces, and where what it writes lies.

    `data` is what the device gets: the rows, and behind them where each
    segment's bytes begin.  `places` are, for each row, its planes in the
    output, which has `nbytes`.
    """

    data: Bytes
    count: int
    pieces: int
    places: Sequence[Sequence[Place]]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Place:
    """A plane of differences in the output: `count` bytes from `start` on, or a packed plane's.

    Of that the bytes that aren't zero are `packed`; `start` is where parts of
    its bitmap begin: those of the segments that are `there`, bool[segments].
    """

    start: int
    count: int
    packed: Span | None = None
    there: npt.NDArray[np.bool_] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the device has written of it."""
        if self.packed is None or self.there is None:
            return self.count
        return self.packed.end - self.start

    def of(self, data: Bytes) -> Folded:
        """The plane, or its bitmap (new memory) and its bytes that aren't zero."""
        if self.packed is None or self.there is None:
            return data[self.start : self.start + self.count]
        bitmap = np.zeros((self.there.size, _BITMAP_NBYTES), np.uint8)
        parts = data[self.start :][: int(self.there.sum()) * _BITMAP_NBYTES]
        bitmap[self.there] = parts.reshape(-1, _BITMAP_NBYTES)
        whole = bitmap.reshape(-1)[: bitmap_nbytes(self.count)]
        return whole, data[self.packed.start : self.packed.end]


def survey_nbytes(chunks: Rows) -> int:
    """Room for a survey of all `chunks` (of `kernels.CHUNK`)."""
    return int(np.sum(sum(_sizes(chunks)) + PAIR.itemsize)) if len(chunks) else 0


def lay_out_survey(chunks: Rows, now: int, before: int, table: int) -> Survey:
    """Rows of `chunks` (of `kernels.CHUNK`), whose planes lie behind `now` and behind `before`.

    Where a chunk is turned, its planes are of turned elements in both.

    The table lies at the address `table`, and what is found out behind it.
    """
    rows = np.zeros(len(chunks), PAIR)
    count = _counts(chunks)
    for name, address in (("now", now), ("before", before)):
        rows[name] = chunks["planes"] + np.uint64(address)
    rows["count"], rows["width"], rows["stride"] = count, chunks["width"], chunks["stride"]
    rows["turned"] = chunks["turned"]
    rows["every"] = np.maximum(count // SAMPLE, 1)
    found, histograms = _sizes(chunks)
    ends = np.cumsum(found + histograms)
    rows["found"] = table + rows.nbytes + ends - histograms - found
    rows["histograms"] = table + rows.nbytes + ends - histograms
    return Survey(rows, _number(rows), survey_nbytes(chunks))


def lay_out_packing(
    survey: Survey, picked: Sequence[int], counts: Sequence[Counts], table: int, out: int
) -> Packing:
    """Rows for some of a survey's, given their counts, which decide how each plane is written.

    The table lies at the address `table`; what is written, behind `out`.
    """
    rows = survey.rows[np.array(picked, np.intp)]
    starts, places, at, end = [], [], rows.nbytes, 0
    for row, counted in zip(rows, counts, strict=True):
        begins = np.empty((*counted.shape, 2), np.uint32)
        row["found"], at = table + at, at + begins.nbytes
        row["out"], row["sparse"] = out, 0
        planes = []
        for k, each in enumerate(counted.T):
            plane, end = _placed(int(row["count"]), each, end, begins[:, k])
            row["sparse"] |= np.uint64((plane.packed is not None) << k)
            row["out"][k] = out if plane.packed is not None else out + plane.start
            planes.append(plane)
        starts.append(begins)
        places.append(planes)
    pieces = _number(rows)
    data = b"".join((rows.tobytes(), *(one.tobytes() for one in starts)))
    return Packing(np.frombuffer(data, np.uint8), len(rows), pieces, places, end)


def packing_nbytes(area_nbytes: int) -> int:
    """Room for a packing's rows and starts, of chunks that share a slot with such areas."""
    return area_nbytes // 64  # a chunk of 64 KiB takes 272 bytes at most, larger ones less


def _placed(
    count: int, counted: Counts, at: int, begins: npt.NDArray[np.uint32]
) -> tuple[Place, int]:
    """Where a plane goes from `at` on, and where it ends, given the counts of its segments.

    Of a packed one `begins`, uint32[segments, 2], becomes where each segment's
    bytes and its part of the bitmap begin.
    """
    begins[:] = _NONE
    number = int(counted.sum())
    if not is_sparse(number, count):
        return Place(at, count), _up(at + count)
    there = counted > 0
    end = at + int(there.sum()) * _BITMAP_NBYTES
    begins[:, 0] = end + np.cumsum(counted) - counted
    begins[there, 1] = np.arange(at, end, _BITMAP_NBYTES)
    return Place(at, count, Span(end, number), there), _up(end + number)


def _number(rows: Rows) -> int:
    """Say which pieces each row has; how many all have."""
    pieces = -(-rows["count"].astype(np.int64) // PIECE)
    rows["first_piece"] = np.cumsum(pieces) - pieces
    return int(pieces.sum())


def _counts(chunks: Rows) -> Any:
    return chunks["nbytes"].astype(np.int64) // chunks["width"]


def _sizes(chunks: Rows) -> tuple[Any, Any]:
    """What the counts, and what the histograms of each chunk take."""
    widths = chunks["width"].astype(np.int64)
    return _up(4 * widths * -(-_counts(chunks) // SEGMENT)), _histograms_nbytes(widths)


def _histograms_nbytes(width: Any) -> Any:
    return 2 * width * _VALUES * 2


def _up(nbytes: Any) -> Any:
    return -(-nbytes // 16) * 16
