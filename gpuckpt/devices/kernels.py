"""The kernels: chunks ↔ their planes, with digests and statistics of their leaves; strided runs.

Their contracts stand in kernels/*.cu; one launch does a table of them.
Importing this needs no cupy.  Nothing here waits for the device or allocates
on it.  Addresses are of memory on the current device, which must stay until
the stream has come past the launch; tables and what is staged are 16-aligned.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuckpt.layout import LEAF_NBYTES

OPTIONS = ("-std=c++17",)
DIGEST_NBYTES = 16
WIDTHS = (1, 2, 4, 8)
# Planes and summaries begin at multiples of this, as 16-byte loads and stores want it.
ALIGNMENT = 16
# A row of the kernels' table: `struct Chunk` of kernels/chunks.cuh, byte for byte.
CHUNK = np.dtype(
    [
        *((name, "<u8") for name in ("tensor", "nbytes", "planes", "stride", "summaries")),
        *((name, "<u8") for name in ("first_leaf", "base", "expected", "values")),
        ("width", "<u4"),
        *((name, "<u2") for name in ("kind", "turned")),
    ]
)
# What is said of a leaf: `struct Summary` of kernels/statistics.cuh.
SUMMARY = np.dtype(
    {
        "names": ["digest", "squares", "nans", "infs", "zeros", "unchanged"],
        "formats": [("u1", DIGEST_NBYTES), "<f8", "<u4", "<u4", ("<u4", 8), "<u4"],
        "offsets": [0, 16, 24, 28, 32, 64],
        "itemsize": 80,
    }
)
_KERNELS = {
    "filter": "filter_chunks",
    "unfilter": "unfilter_chunks",
    "digest": "digest_chunks",
    "gather": "gather_runs",
    "scatter": "scatter_runs",
    "survey": "survey_deltas",
    "sample": "sample_deltas",
    "pack": "pack_deltas",
}
_THREADS = 256
_GRID_MAX = 2**31 - 1
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)

Integers = npt.ArrayLike


@dataclass(frozen=True, slots=True)
class Layout:
    """What one launch works on: a table of chunks, and where each has its planes and summaries.

    `rows` (`CHUNK`) has no addresses yet, kind 0, and nothing turned: write them there.
    Positions are bytes from where staged memory begins; all are below
    `staged_nbytes`.
    """

    rows: npt.NDArray[Any]
    staged_nbytes: int
    leaves: int

    def planes(self, row: int) -> list[slice]:
        """Where in the staged bytes each of a chunk's planes lies."""
        return self.all_planes(slice(row, row + 1))[0]

    def all_planes(self, which: slice = slice(None)) -> list[list[slice]]:
        """The same of each of some chunks."""
        rows = self.rows[which]
        fields = (rows[name].tolist() for name in ("planes", "stride", "width", "nbytes"))
        return [
            [slice(start + k * stride, start + k * stride + nbytes // width) for k in range(width)]
            for start, stride, width, nbytes in zip(*fields, strict=True)
        ]

    def summaries(self, row: int) -> slice:
        """Where in the staged bytes the summaries (`SUMMARY`) of a chunk's leaves lie."""
        start = int(self.rows["summaries"][row])
        return slice(start, start + self._leaves(row) * SUMMARY.itemsize)

    def digests(self, row: int) -> slice:
        """Which of all leaves' digests, 16 bytes each, are those of a chunk's leaves."""
        first = int(self.rows["first_leaf"][row])
        return slice(first, first + self._leaves(row))

    def _leaves(self, row: int) -> int:
        return -(-int(self.rows["nbytes"][row]) // LEAF_NBYTES)


def lay_out(
    nbytes: Integers, widths: Integers, *, start: int = 0, summaries: bool = True
) -> Layout:
    """Lay out chunks of some raw lengths and widths in staged memory, from byte `start` on.

    First the summaries of all, if wanted, then the planes of each chunk, in
    this order.  A chunk takes at most `width` · 15 bytes more than it has and
    its summaries, none if its planes are multiples of 16 bytes.
    """
    lengths, planes = np.asarray(nbytes, np.uint64), np.asarray(widths, np.uint64)
    assert start % ALIGNMENT == 0, start
    assert set(planes.tolist()) <= set(WIDTHS), widths
    rows = np.zeros(lengths.size, CHUNK)
    if not rows.size:
        return Layout(rows, start, 0)
    count, rest = np.divmod(lengths, planes)
    assert not rest.any(), "an element is cut"
    stride = (count + np.uint64(ALIGNMENT - 1)) & np.uint64(~(ALIGNMENT - 1) % 2**64)
    leaves = (lengths + np.uint64(LEAF_NBYTES - 1)) // np.uint64(LEAF_NBYTES)
    all_leaves, all_planes = np.cumsum(leaves), np.cumsum(stride * planes)
    first_leaf, total = all_leaves - leaves, int(all_leaves[-1])
    after = start + summaries * total * SUMMARY.itemsize
    rows["nbytes"], rows["width"], rows["stride"] = lengths, planes, stride
    rows["first_leaf"] = first_leaf
    rows["planes"] = all_planes - stride * planes + np.uint64(after)
    rows["summaries"] = first_leaf * np.uint64(SUMMARY.itemsize) + np.uint64(start)
    return Layout(rows, after + int(all_planes[-1]), total)


def filter_chunks(table_ptr: int, rows: int, leaves: int, staged_ptr: int, stream: Any) -> None:
    """Put chunks' planes, and summaries of their leaves, to where their rows say, on `stream`.

    `table_ptr` is the address of `Layout.rows` on the device, `staged_ptr`
    where staged memory begins.
    """
    _launch("filter", leaves, (table_ptr, rows, leaves, staged_ptr), stream)


def unfilter_chunks(  # noqa: PLR0917 - the kernel's arguments in their order
    table_ptr: int, rows: int, leaves: int, staged_ptr: int, digests_ptr: int, stream: Any
) -> None:
    """Join planes into the chunks, and take the digests of what was written: 16 bytes a leaf.

    The inverse of `filter_chunks`.  A row's base may be its tensor itself.
    """
    _launch("unfilter", leaves, (table_ptr, rows, leaves, staged_ptr, digests_ptr), stream)


def digest_chunks(table_ptr: int, rows: int, leaves: int, digests_ptr: int, stream: Any) -> None:
    """Take the digests of the chunks as they are: 16 bytes a leaf, XXH3-128."""
    _launch("digest", leaves, (table_ptr, rows, leaves, digests_ptr), stream)


def gather_runs(table_ptr: int, rows: int, pieces: int, stream: Any) -> None:
    """Pack runs of strided tensors; `table_ptr` is the address of `Runs.rows` on the device."""
    _launch("gather", pieces, (table_ptr, rows, pieces), stream)


def scatter_runs(table_ptr: int, rows: int, pieces: int, stream: Any) -> None:
    """Put packed runs back into strided tensors: the inverse of `gather_runs`."""
    _launch("scatter", pieces, (table_ptr, rows, pieces), stream)


def survey_deltas(table_ptr: int, rows: int, pieces: int, stream: Any) -> None:
    """Count what isn't zero in differences; `table_ptr` is the address of `Survey.rows`."""
    _launch("survey", pieces, (table_ptr, rows, pieces), stream)


def sample_deltas(table_ptr: int, rows: int, stream: Any) -> None:
    """Take histograms of chunks and of their differences, for the same table."""
    _launch("sample", rows, (table_ptr, rows), stream)


def pack_deltas(table_ptr: int, rows: int, pieces: int, stream: Any) -> None:
    """Write planes of differences; `table_ptr` is the address of `Packing.data`."""
    _launch("pack", pieces, (table_ptr, rows, pieces), stream)


def load_kernels() -> None:
    """Compile the kernels for the current device, or take them from the disk, and load them.

    Takes seconds the first time; without it, the first launch of each does it.
    """
    import cupy

    device = cupy.cuda.runtime.getDevice()
    for name in _KERNELS:
        _kernel(name, device)


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


def _launch(name: str, blocks: int, arguments: tuple[int, ...], stream: Any) -> None:
    import cupy

    if blocks:
        kernel = _kernel(name, cupy.cuda.runtime.getDevice())
        values = tuple(map(np.uint64, arguments))
        kernel((min(blocks, _GRID_MAX),), (_THREADS,), values, stream=stream)


@functools.cache
def _kernel(name: str, device: int) -> Any:  # noqa: ARG001 - a module is loaded on one device
    """The loaded function, which launches with less ado than the module's own object."""
    import cupy

    module = cupy.RawModule(code=source(name), options=OPTIONS)
    return module.get_function(_KERNELS[name]).kernel
