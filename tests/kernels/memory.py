"""Chunks in host memory for the emulated kernels, and what must be there after a launch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpuckpt.devices import kernels
from gpuckpt.fingerprint import LEAF_UNIT_NBYTES
from gpuckpt.layout import LEAF_NBYTES
from gpuckpt.planes import split
from tests.cuda_on_cpu.emulator import cuemu
from tests.kernels.reference import digest, folded, rotated, statistics_of

FILL = 0xEE
MARGIN = 64
# Sums of squares are right to this much: docs of kernels/statistics.cuh.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Piece:
    """A chunk to be: its bytes' count, their width, and how far from a multiple of 16 it begins.

    `base` is how far the base begins from one, None: there is none. `kind` is
    what its elements are; `expected` whether its digests are given: as they
    are ("same") or with the last one changed ("other"); `turned` whether
    planes are of elements that are.
    """

    nbytes: int
    width: int
    misaligned: int = 0
    base: int | None = None
    kind: int = 0
    expected: str = ""
    turned: bool = False


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


def leaves_of(raw: Any) -> list[Any]:
    return [raw[at : at + LEAF_NBYTES] for at in range(0, raw.size, LEAF_NBYTES)]


def leaf_digests(raw: Any) -> bytes:
    """Of one chunk, as FORMAT.md's section 5 has them."""
    return b"".join(
        digest(leaf.tobytes() + bytes(-leaf.size % LEAF_UNIT_NBYTES)) for leaf in leaves_of(raw)
    )


def near(raw: Any, rng: np.random.Generator) -> Any:
    """Bytes of which most are `raw`'s."""
    change = rng.integers(0, 256, raw.size, dtype=np.uint8)
    return raw + change * (rng.random(raw.size) < 0.1).astype(np.uint8)


@dataclass
class Launch:
    """The memory of one launch over `pieces`, whose bytes are random or `contents`."""

    pieces: list[Piece]
    seed: int = 0
    contents: list[Any] | None = None
    values: Any = None  # float32[256], for kind 5
    chunks: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.chunks = [aligned(piece.nbytes, piece.misaligned) for piece in self.pieces]
        for at, chunk in enumerate(self.chunks):
            drawn = rng.integers(0, 256, chunk.size, dtype=np.uint8)
            drawn[rng.random(chunk.size) < 0.2] = 0
            chunk[:] = drawn if self.contents is None else self.contents[at]
        self.raw = [chunk.copy() for chunk in self.chunks]
        self.bases = [aligned(piece.nbytes, piece.base or 0) for piece in self.pieces]
        for base, raw in zip(self.bases, self.raw, strict=True):
            base[:] = near(raw, rng)
        self.before = [base.copy() for base in self.bases]
        self.expected = [self._expectation(at) for at in range(len(self.pieces))]
        self._make_table()

    def _expectation(self, at: int) -> Any:
        digests = np.frombuffer(leaf_digests(self.raw[at]), np.uint8)
        given = aligned(digests.size, 8)
        given[:] = digests
        if given.size and self.pieces[at].expected == "other":
            given[-1] ^= 1
        return given

    def _make_table(self) -> None:
        self.worth = aligned(1024, 4)
        self.worth[:] = np.zeros(1024, np.uint8) if self.values is None else self.values.view("u1")
        layout = kernels.lay_out([p.nbytes for p in self.pieces], [p.width for p in self.pieces])
        self.layout = layout
        rows = layout.rows
        rows["tensor"] = [chunk.ctypes.data for chunk in self.chunks]
        rows["kind"] = [piece.kind for piece in self.pieces]
        rows["turned"] = [piece.turned for piece in self.pieces]
        for row, piece, base, given in zip(
            rows, self.pieces, self.bases, self.expected, strict=True
        ):
            row["base"] = base.ctypes.data if piece.base is not None else 0
            row["expected"] = given.ctypes.data if piece.expected else 0
            row["values"] = self.worth.ctypes.data if piece.kind == 5 else 0
        self.table = aligned(rows.nbytes)
        self.staged = aligned(layout.staged_nbytes)
        self.digests = aligned(layout.leaves * kernels.DIGEST_NBYTES)

    def based(self, at: int) -> bool:
        return self.pieces[at].base is not None

    def written(self, at: int) -> Any:
        """A chunk's bytes as they go to planes."""
        width, raw = self.pieces[at].width, self.raw[at]
        raw = folded(raw, self.before[at], width) if self.based(at) else raw
        return rotated(raw, width) if self.pieces[at].turned else raw

    def expected_staged(self) -> Any:
        staged = np.full(self.staged.size, FILL, np.uint8)
        for at, piece in enumerate(self.pieces):
            data = self.written(at)
            planes = split(data, piece.width, np.empty(data.size, np.uint8))
            for place, plane in zip(self.layout.planes(at), planes, strict=True):
                staged[place] = plane
        return staged

    def summaries(self, at: int) -> Any:
        """What was said of a chunk's leaves."""
        return self.staged[self.layout.summaries(at)].view(kernels.SUMMARY)

    def run(self, library: cuemu.Lib, name: str, grid: int | None = None) -> None:
        """Launch; a checked library lets the kernel touch what it may and no more."""
        self.table[:] = self.layout.rows.view(np.uint8)
        if hasattr(library.dll, "cuemu_regions"):
            self._allow(library, name)
        sizes = [self.layout.rows.size, self.layout.leaves]
        kept = {"filter": [self.staged], "unfilter": [self.staged, self.digests]}
        arguments = [self.table, *sizes, *kept.get(name, [self.digests])]
        library.launch(f"{name}_chunks", grid or max(self.layout.leaves, 1), 256, arguments)

    def _allow(self, library: cuemu.Lib, name: str) -> None:
        rows = range(len(self.pieces))
        planes = [self.staged[place] for row in rows for place in self.layout.planes(row)]
        summaries = [self.staged[self.layout.summaries(row)] for row in rows]
        bases = [self.bases[row] for row in rows if self.based(row)]
        bases = [] if self.in_place else bases
        table = [self.table]
        ours, theirs = {
            "filter": (
                planes + summaries,
                table + self.chunks + bases + self.expected + [self.worth],
            ),
            "unfilter": ([self.digests, *self.chunks], table + planes + bases),
            "digest": ([self.digests], table + self.chunks),
        }[name]
        library.regions(
            *(array for array in ours if array.size),
            readonly=[array for array in theirs if array.size],
        )

    @property
    def in_place(self) -> bool:
        """Whether bases are the tensors' own memory."""
        rows = self.layout.rows
        return bool((rows["base"] == rows["tensor"]).any())

    def filter(self, library: cuemu.Lib, grid: int | None = None) -> None:
        """Filter, and compare every byte."""
        self.staged[:] = FILL
        self.run(library, "filter", grid)
        staged = self.expected_staged()
        for at in range(len(self.pieces)):
            self._check_summaries(at)
            place = self.layout.summaries(at)
            staged[place] = self.staged[place]
        assert np.array_equal(self.staged, staged)
        self._check_inputs()

    def _check_summaries(self, at: int) -> None:
        """Every byte of a chunk's summaries, where sums of squares may differ a little."""
        piece, found = self.pieces[at], self.summaries(at)
        known = np.zeros(found.size, kernels.SUMMARY)
        known["digest"] = np.frombuffer(leaf_digests(self.raw[at]), "u1").reshape(-1, 16)
        pairs = zip(leaves_of(self.raw[at]), leaves_of(self.written(at)), strict=True)
        for row, (raw, written) in zip(known, pairs, strict=True):
            row["nans"], row["infs"], row["squares"] = statistics_of(raw, piece.kind, self.values)
            zeros = (written.reshape(-1, piece.width) == 0).sum(axis=0)
            row["zeros"][: piece.width] = zeros
        known["unchanged"] = piece.expected != ""
        if piece.expected == "other":
            known["unchanged"][-1:] = 0
        assert np.allclose(found["squares"], known["squares"], rtol=TOLERANCE, atol=0), piece
        known["squares"] = found["squares"]
        assert np.array_equal(found.view(np.uint8), known.view(np.uint8)), (piece, found, known)

    def unfilter(self, library: cuemu.Lib, grid: int | None = None) -> None:
        """Unfilter planes as they should be into chunks without contents; compare every byte."""
        self.staged[:] = self.expected_staged()
        for chunk in self.chunks:
            chunk[:] = FILL
        self.run(library, "unfilter", grid)
        assert np.array_equal(self.staged, self.expected_staged())
        self._check_digests()
        self._check_inputs()

    def unfilter_in_place(self, library: cuemu.Lib, grid: int | None = None) -> None:
        """The same where each base is the tensor itself."""
        self.staged[:] = self.expected_staged()
        for at, chunk in enumerate(self.chunks):
            chunk[:] = self.before[at] if self.based(at) else FILL
            if self.based(at):
                self.layout.rows["base"][at] = chunk.ctypes.data
        self.run(library, "unfilter", grid)
        self._check_digests()
        self._check_inputs()

    def digest(self, library: cuemu.Lib, grid: int | None = None) -> None:
        """Take the digests of chunks as they are."""
        self.digests[:] = FILL
        self.run(library, "digest", grid)
        self._check_digests()
        self._check_inputs()

    def _check_digests(self) -> None:
        digests = self.digests.reshape(-1, kernels.DIGEST_NBYTES)
        for at, raw in enumerate(self.raw):
            found = digests[self.layout.digests(at)].tobytes()
            assert found == leaf_digests(raw), self.pieces[at]

    def _check_inputs(self) -> None:
        """The chunks are what they should be, and all else is as it was."""
        for chunk, raw, piece in zip(self.chunks, self.raw, self.pieces, strict=True):
            assert np.array_equal(chunk, raw), piece
        for base, before in zip(self.bases, self.before, strict=True):
            assert np.array_equal(base, before)
        kept = (self.table, self.staged, self.digests, self.worth)
        for array in (*self.chunks, *self.bases, *self.expected, *kept):
            assert untouched_around(array)
