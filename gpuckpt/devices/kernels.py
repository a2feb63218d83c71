"""The filter on the device: chunks ↔ their planes, and the digests of their leaves, in one launch.

The kernels' contracts stand in kernels/*.cu.  cupy compiles them at their first
use on a device and keeps the result on disk; importing this needs no cupy.
Nothing here waits for the device or allocates on it.  Memory that is passed
must stay until the stream has come past the launch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuckpt.layout import LEAF_NBYTES

OPTIONS = ("-std=c++17",)
DIGEST_NBYTES = 16
WIDTHS = (1, 2, 4, 8)
# Planes begin here at multiples of this, as 16-byte loads and stores want it.
ALIGNMENT = 16
# A row of the kernels' table: `struct Chunk` of kernels/chunks.cuh, byte for byte.
CHUNK = np.dtype(
    {
        "names": ["tensor", "nbytes", "planes", "stride", "first_leaf", "width"],
        "formats": ["<u8", "<u8", "<u8", "<u8", "<u8", "<u4"],
        "offsets": [0, 8, 16, 24, 32, 40],
        "itemsize": 48,
    }
)
_THREADS = 256
_GRID_MAX = 2**31 - 1
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Layout:
    """What one launch works on: a table of chunks, and where each has its planes and digests."""

    rows: npt.NDArray[Any]  # CHUNK
    staged_nbytes: int
    leaves: int

    def planes(self, row: int) -> list[slice]:
        """Where in the staged bytes each of a chunk's planes lies."""
        start, stride = int(self.rows["planes"][row]), int(self.rows["stride"][row])
        width = int(self.rows["width"][row])
        count = int(self.rows["nbytes"][row]) // width
        return [slice(start + k * stride, start + k * stride + count) for k in range(width)]

    def digests(self, row: int) -> slice:
        """Where in the bytes of all digests those of a chunk's leaves lie."""
        first = int(self.rows["first_leaf"][row])
        leaves = -(-int(self.rows["nbytes"][row]) // LEAF_NBYTES)
        return slice(first * DIGEST_NBYTES, (first + leaves) * DIGEST_NBYTES)


def lay_out(addresses: Sequence[int], nbytes: Sequence[int], widths: Sequence[int]) -> Layout:
    """Lay out chunks by address on the device, raw length and width, their planes in this order.

    A chunk takes at most `width` · 15 bytes more than it has, none if its
    planes are multiples of 16 bytes.
    """
    rows = np.zeros(len(addresses), CHUNK)
    rows["tensor"], rows["nbytes"], rows["width"] = addresses, nbytes, widths
    assert np.isin(rows["width"], WIDTHS).all(), widths
    assert not (rows["nbytes"] % rows["width"]).any(), "an element is cut"
    count = rows["nbytes"] // rows["width"]
    rows["stride"] = (count + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT
    ends = np.cumsum(rows["stride"] * rows["width"], dtype=np.uint64)
    leaves = np.cumsum((rows["nbytes"] + (LEAF_NBYTES - 1)) // LEAF_NBYTES, dtype=np.uint64)
    rows["planes"][1:], rows["first_leaf"][1:] = ends[:-1], leaves[:-1]
    return Layout(rows, int(ends[-1]), int(leaves[-1])) if len(rows) else Layout(rows, 0, 0)


def filter_chunks(layout: Layout, table: Any, staged: Any, digests: Any, stream: Any) -> None:
    """Split the chunks' planes into `staged`, and take the digests of their leaves, on `stream`.

    All are contiguous cupy arrays of uint8 on the current device, aligned to
    16: `table` holds `layout.rows`, `staged` at least `staged_nbytes`,
    `digests` 16 bytes a leaf (XXH3-128, most significant byte first).
    """
    _launch("filter", layout, (table, staged, digests), stream)


def unfilter_chunks(layout: Layout, table: Any, staged: Any, digests: Any, stream: Any) -> None:
    """Join planes from `staged` into the chunks, and take the digests of what was written.

    The inverse of `filter_chunks`, with its arguments.
    """
    _launch("unfilter", layout, (table, staged, digests), stream)


def source(name: str) -> str:
    """The text of kernels/<name>.cu with what it includes.

    cupy's disk cache looks at the text alone, and would not see a changed header.
    """
    directory = _directory()
    text = (directory / f"{name}.cu").read_text("utf-8")
    return _INCLUDE.sub(lambda match: (directory / match[1]).read_text("utf-8"), text)


def _directory() -> Path:
    """The sources: in the package where it was installed, else beside it."""
    installed = Path(__file__).parents[1] / "_kernels"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "kernels"


def _launch(name: str, layout: Layout, arrays: tuple[Any, Any, Any], stream: Any) -> None:
    import cupy

    table, staged, digests = arrays
    device = cupy.cuda.runtime.getDevice()
    room = (layout.rows.nbytes, layout.staged_nbytes, layout.leaves * DIGEST_NBYTES)
    for array, nbytes in zip(arrays, room, strict=True):
        assert array.dtype == np.uint8, array.dtype
        assert array.flags.c_contiguous
        assert array.size >= nbytes, (array.size, nbytes)
        assert array.data.ptr % ALIGNMENT == 0 or not nbytes
        assert array.device.id == device, (array.device, device)
    if layout.leaves:
        count, leaves = np.uint64(layout.rows.size), np.uint64(layout.leaves)
        grid = min(layout.leaves, _GRID_MAX)
        with stream:
            _kernel(name, device)((grid,), (_THREADS,), (table, count, leaves, staged, digests))


@functools.cache
def _kernel(name: str, device: int) -> Any:  # noqa: ARG001 - a module is loaded on one device
    import cupy

    module = cupy.RawModule(code=source(name), options=OPTIONS)
    return module.get_function(f"{name}_chunks")
