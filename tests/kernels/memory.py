"""Chunks in host memory for the emulated kernels, and what must be there after a launch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from gpuckpt.devices import kernels
from gpuckpt.fingerprint import LEAF_UNIT_NBYTES
from gpuckpt.layout import LEAF_NBYTES
from gpuckpt.planes import split
from tests.cuda_on_cpu.emulator import cuemu

FILL = 0xEE
MARGIN = 64


@dataclass(frozen=True)
class Piece:
    """A chunk to be: its bytes' count, their width, and how far from a multiple of 16 it begins."""

    nbytes: int
    width: int
    misaligned: int = 0


def aligned(nbytes: int, off: int = 0) -> Any:
    """Bytes at an address `off` above a multiple of 16, all of `FILL`, as are those around them."""
    around = np.full(nbytes + 2 * MARGIN + 16, FILL, np.uint8)
    start = MARGIN + (off - around.ctypes.data - MARGIN) % 16
    return around[start : start + nbytes]


def untouched_around(view: Any) -> bool:
    """Whether the bytes around what `aligned` gave are still as they were."""
    around = view.base
    start = view.ctypes.data - around.ctypes.data
    return bool((around[:start] == FILL).all() and (around[start + view.size :] == FILL).all())


def leaf_digests(raw: Any) -> bytes:
    """Of one chunk, as FORMAT.md's section 5 has them."""
    leaves = [raw[at : at + LEAF_NBYTES].tobytes() for at in range(0, raw.size, LEAF_NBYTES)]
    if leaves and len(leaves[-1]) < LEAF_NBYTES:
        leaves[-1] += bytes(-len(leaves[-1]) % LEAF_UNIT_NBYTES)
    return b"".join(map(xxhash.xxh3_128_digest, leaves))


@dataclass
class Launch:
    """The memory of one launch over `pieces`, whose bytes are random."""

    pieces: list[Piece]
    seed: int = 0
    chunks: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.chunks = [aligned(piece.nbytes, piece.misaligned) for piece in self.pieces]
        for chunk in self.chunks:
            chunk[:] = rng.integers(0, 256, chunk.size, dtype=np.uint8)
        self.raw = [chunk.copy() for chunk in self.chunks]
        addresses = [chunk.ctypes.data for chunk in self.chunks]
        self.layout = kernels.lay_out(
            addresses, [p.nbytes for p in self.pieces], [p.width for p in self.pieces]
        )
        self.table = aligned(self.layout.rows.nbytes)
        self.table[:] = self.layout.rows.view(np.uint8)
        self.staged = aligned(self.layout.staged_nbytes)
        self.digests = aligned(self.layout.leaves * kernels.DIGEST_NBYTES)

    def expected_staged(self) -> Any:
        staged = np.full(self.staged.size, FILL, np.uint8)
        for at, (raw, piece) in enumerate(zip(self.raw, self.pieces, strict=True)):
            planes = split(raw, piece.width, np.empty(raw.size, np.uint8))
            for place, plane in zip(self.layout.planes(at), planes, strict=True):
                staged[place] = plane
        return staged

    def planes(self) -> list[Any]:
        """The staged bytes that kernels may touch, each plane by itself."""
        rows = range(len(self.pieces))
        return [self.staged[place] for row in rows for place in self.layout.planes(row)]

    def run(self, library: cuemu.Lib, name: str, grid: int | None = None) -> None:
        """Launch; a checked library lets the kernel touch what it may and no more."""
        if hasattr(library.dll, "cuemu_regions"):
            tables, ours = [self.table], [self.digests]
            (ours if name == "unfilter" else tables).extend(self.chunks)
            (ours if name == "filter" else tables).extend(self.planes())
            kept = [[a for a in arrays if a.size] for arrays in (ours, tables)]
            library.regions(*kept[0], readonly=kept[1])
        sizes = [self.layout.rows.size, self.layout.leaves]
        arguments = [self.table, *sizes, self.staged, self.digests]
        library.launch(f"{name}_chunks", grid or self.layout.leaves, 256, arguments)

    def filter(self, library: cuemu.Lib, grid: int | None = None) -> None:
        """Filter, and compare every byte."""
        self.run(library, "filter", grid)
        assert np.array_equal(self.staged, self.expected_staged())
        self.check(self.chunks)

    def unfilter(self, library: cuemu.Lib, grid: int | None = None) -> None:
        """Unfilter planes as they should be into chunks without contents; compare every byte."""
        self.staged[:] = self.expected_staged()
        for chunk in self.chunks:
            chunk[:] = FILL
        self.run(library, "unfilter", grid)
        assert np.array_equal(self.staged, self.expected_staged())
        self.check(self.chunks)

    def check(self, chunks: list[Any]) -> None:
        for at, (raw, chunk) in enumerate(zip(self.raw, chunks, strict=True)):
            assert np.array_equal(chunk, raw), self.pieces[at]
            found = self.digests[self.layout.digests(at)].tobytes()
            assert found == leaf_digests(raw), self.pieces[at]
        for array in (*chunks, self.table, self.staged, self.digests):
            assert untouched_around(array)
