"""The kernels, by events: bytes read and written a second, as a share of a plain copy's.

Each result is looked at before it is timed: what doesn't come back is not fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import cupy
import numpy as np

from bench.gpu.contents import normal
from bench.gpu.limits import Limits, timed
from bench.gpu.scale import Scale
from bench.timing import spread
from gpuckpt.devices import kernels
from gpuckpt.devices.strided import Run, lay_out_runs
from gpuckpt.dtypes import width_of
from gpuckpt.layout import CHUNK_NBYTES
from gpuckpt.statistics import byte_values, kind_of

# Every width, and every way of counting what isn't finite.
DTYPES = ("uint8", "float8_e4m3fn", "float16", "bfloat16", "float32", "float64")
_TILE = 32


class Chunks:
    """Memory cut into chunks, its table, and room for what the kernels make of it."""

    def __init__(self, dtype: str, nbytes: int, *, misaligned: bool) -> None:
        """`misaligned`: it begins one element after a multiple of 256."""
        width = width_of(dtype)
        chunk_nbytes = min(CHUNK_NBYTES, nbytes)
        count = nbytes // chunk_nbytes
        self.nbytes = count * chunk_nbytes
        self.memory = normal(self.nbytes, dtype, misaligned * width)
        values = byte_values(dtype)
        self._values = None if values is None else cupy.asarray(values)
        layout = kernels.lay_out([chunk_nbytes] * count, [width] * count)
        starts = np.arange(count, dtype=np.uint64) * np.uint64(chunk_nbytes)
        layout.rows["tensor"] = starts + np.uint64(self.memory.data.ptr)
        layout.rows["kind"] = kind_of(dtype)
        layout.rows["values"] = 0 if self._values is None else self._values.data.ptr
        self.leaves, self.rows = layout.leaves, len(layout.rows)
        self.table = cupy.asarray(layout.rows.view(np.uint8))
        self.staged = cupy.zeros(layout.staged_nbytes, np.uint8)
        self.digests = cupy.zeros(layout.leaves * kernels.DIGEST_NBYTES, np.uint8)

    def filter(self) -> None:
        """Split into planes."""
        kernels.filter_chunks(*self._table(), self.staged.data.ptr, _stream())

    def unfilter(self) -> None:
        """Join the planes."""
        digests = self.digests.data.ptr
        kernels.unfilter_chunks(*self._table(), self.staged.data.ptr, digests, _stream())

    def digest(self) -> None:
        """Take the digests alone."""
        kernels.digest_chunks(*self._table(), self.digests.data.ptr, _stream())

    def check(self) -> None:
        """See that the bytes come back, with the digests that they had."""
        self.digest()
        before, digests = self.memory.copy(), self.digests.copy()
        self.filter()
        self.memory.fill(0)
        self.unfilter()
        assert bool((self.memory == before).all()), "the bytes didn't come back"
        assert bool((self.digests == digests).all()), "the digests differ"

    def _table(self) -> tuple[int, int, int]:
        return self.table.data.ptr, self.rows, self.leaves


def kernel_rows(scale: Scale, best: Limits) -> Iterator[dict[str, Any]]:
    """A row for each kernel, element type and alignment."""
    for dtype in DTYPES:
        for misaligned in (False, True):
            chunks = Chunks(dtype, scale.kernel_nbytes, misaligned=misaligned)
            chunks.check()
            facts = {"dtype": dtype, "width": width_of(dtype), "misaligned": misaligned}
            both, read = chunks.nbytes + chunks.staged.nbytes, chunks.nbytes
            yield _row("filter", scale, best, chunks.filter, both, **facts)
            yield _row("unfilter", scale, best, chunks.unfilter, both, **facts)
            yield _row("digest", scale, best, chunks.digest, read, **facts)
            del chunks
    yield from gather_rows(scale, best)


def gather_rows(scale: Scale, best: Limits) -> Iterator[dict[str, Any]]:
    """Strided float32 tensors: a transposed matrix, and every second column of one."""
    side = int((scale.kernel_nbytes / 4) ** 0.5) // _TILE * _TILE
    whole = normal(4 * side * side).view(np.float32).reshape(side, side)
    for name, tensor in (("transposed", whole.T), ("every second column", whole[:, ::2])):
        packed = cupy.empty(tensor.nbytes, np.uint8)
        runs = lay_out_runs(list(_runs(tensor, packed.data.ptr)))
        table = cupy.asarray(runs.rows.view(np.uint8))
        arguments = (table.data.ptr, len(runs.rows), runs.pieces, _stream())
        gather, scatter = (
            partial(kernels.gather_runs, *arguments),
            partial(kernels.scatter_runs, *arguments),
        )
        gather()
        expected = cupy.ascontiguousarray(tensor).view(np.uint8).reshape(-1)
        assert bool((packed == expected).all()), "the bytes aren't in C order"
        facts = {"dtype": "float32", "shape": list(tensor.shape), "view": name}
        yield _row("gather", scale, best, gather, 2 * tensor.nbytes, **facts)
        yield _row("scatter", scale, best, scatter, 2 * tensor.nbytes, **facts)


def _runs(tensor: Any, packed: int) -> Iterator[Run]:
    """A run for each chunk, as a save has them."""
    for start in range(0, tensor.nbytes, CHUNK_NBYTES):
        nbytes = min(CHUNK_NBYTES, tensor.nbytes - start)
        layout = (tensor.data.ptr, tensor.shape, tensor.strides, tensor.itemsize)
        yield Run(*layout, packed + start, start, nbytes)


def _row(
    case: str, scale: Scale, best: Limits, work: Callable[[], object], moved: int, **facts: Any
) -> dict[str, Any]:
    seconds = timed(scale, work)
    rates = [moved / one for one in seconds]
    return {
        "case": case,
        **facts,
        "moved_nbytes": moved,
        "seconds": spread(seconds),
        "bytes_per_s": spread(rates),
        "share_of_copy": spread(rate / best.copy for rate in rates),
    }


def _stream() -> Any:
    return cupy.cuda.get_current_stream()
