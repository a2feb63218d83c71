"""Copies of chunks in planes, and those before, for the emulated kernels of deltas."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpuckpt.devices import kernels
from gpuckpt.devices.pairs import Packing, Place, Survey, lay_out_packing, lay_out_survey
from gpuckpt.planes import split
from gpuckpt.sparse import pack_sparse
from tests.cuda_on_cpu.emulator import cuemu
from tests.kernels.memory import FILL, aligned, untouched_around
from tests.kernels.reference import folded


@dataclass(frozen=True)
class Copy:
    """A chunk to be: its elements, their width, and the share of them that has changed by `by`."""

    count: int
    width: int
    changed: float = 0.1
    by: int = 3
    turned: bool = False


@dataclass
class Copies:
    """Two copies of chunks as `filter.cu` writes them, and the tables of a launch over them."""

    chunks: list[Copy]
    seed: int = 0
    raw: list[Any] = field(init=False)
    before: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.before = [rng.integers(0, 256, c.count * c.width, np.uint8) for c in self.chunks]
        self.raw = [_changed(b, c, rng) for b, c in zip(self.before, self.chunks, strict=True)]
        self.place(self.raw, self.before)

    def place(self, raw: list[Any], before: list[Any]) -> None:
        """Copies of these bytes."""
        self.raw, self.before = raw, before
        sizes = [one.size for one in raw]
        self.layout = kernels.lay_out(sizes, [c.width for c in self.chunks])
        self.layout.rows["turned"] = [c.turned for c in self.chunks]
        self.now, self.old = self._staged(self.raw, 0xAA), self._staged(self.before, 0x55)
        self.survey = self._surveyed(0)
        self.table = aligned(self.survey.nbytes)
        self.survey = self._surveyed(self.table.ctypes.data)

    def _surveyed(self, table: int) -> Survey:
        now, old = self.now.ctypes.data, self.old.ctypes.data
        return lay_out_survey(self.layout.rows, now, old, table)

    def _staged(self, chunks: list[Any], between: int) -> Any:
        """Planes, with something else between them in either copy."""
        staged = aligned(self.layout.staged_nbytes)
        staged[:] = between
        for at, (raw, chunk) in enumerate(zip(chunks, self.chunks, strict=True)):
            planes = split(raw, chunk.width, np.empty_like(raw), turned=chunk.turned)
            for place, plane in zip(self.layout.planes(at), planes, strict=True):
                staged[place] = plane
        return staged

    @property
    def results(self) -> Any:
        """What the kernels said."""
        return self.table[self.survey.rows.nbytes :]

    def differences(self, at: int) -> list[Any]:
        """The planes of a chunk's differences, by the reference."""
        chunk = self.chunks[at]
        data = folded(self.raw[at], self.before[at], chunk.width)
        return list(split(data, chunk.width, np.empty_like(data)))

    def survey_counts(self, library: cuemu.Lib, grid: int | None = None) -> list[Any]:
        """Count, and compare every count; they are returned."""
        self.table[:] = FILL
        self.table[: self.survey.rows.nbytes] = self.survey.rows.view(np.uint8)
        found = [self.survey.counts(self.results, at) for at in range(len(self.chunks))]
        self._launch(library, "survey_deltas", grid, self.survey.pieces, found)
        known = [self.expected_counts(at) for at in range(len(self.chunks))]
        for one, other in zip(found, known, strict=True):
            assert np.array_equal(one, other), (one, other)
        self._check_untouched()
        return known

    def expected_counts(self, at: int) -> Any:
        counts = [
            [np.count_nonzero(plane[first : first + 4096]) for plane in self.differences(at)]
            for first in range(0, self.chunks[at].count, 4096)
        ]
        return np.array(counts, np.uint32)

    def sample(self, library: cuemu.Lib, grid: int | None = None) -> None:
        """Take histograms, and compare them."""
        self.table[:] = FILL
        self.table[: self.survey.rows.nbytes] = self.survey.rows.view(np.uint8)
        found = [self.survey.histograms(self.results, at) for at in range(len(self.chunks))]
        self._launch(library, "sample_deltas", grid, None, found)
        for at, chunk in enumerate(self.chunks):
            every = max(chunk.count // 4096, 1)
            own = list(self.raw[at].reshape(-1, chunk.width).T)
            for side, planes in enumerate((own, self.differences(at))):
                for k, plane in enumerate(planes):
                    known = np.bincount(plane[::every], minlength=256)
                    assert np.array_equal(found[at][side, k], known), (at, side, k)
        self._check_untouched()

    def pack(self, library: cuemu.Lib, grid: int | None = None) -> None:
        """Pack, and compare every byte that is written."""
        picked = range(len(self.chunks))
        counts = [self.expected_counts(at) for at in picked]
        packing = lay_out_packing(self.survey, picked, counts, 0, 0)
        table, out = aligned(packing.data.size), aligned(packing.nbytes)
        ends = table.ctypes.data, out.ctypes.data
        packing = lay_out_packing(self.survey, picked, counts, *ends)
        table[:] = packing.data
        self._launch_packing(library, grid, packing, table, out)
        written = np.zeros(out.size, np.bool_)
        for at in picked:
            for plane, place in zip(self.differences(at), packing.places[at], strict=True):
                self._check_plane(plane, place.of(out))
                for start, end in _covered(place):
                    assert not written[start:end].any()
                    written[start:end] = True
        assert (out[~written] == FILL).all()
        assert untouched_around(table)
        assert untouched_around(out)
        self._check_untouched()

    @staticmethod
    def _check_plane(plane: Any, found: Any) -> None:
        if isinstance(found, tuple):
            bitmap, packed = (np.empty_like(part) for part in found)
            assert pack_sparse(plane, bitmap, packed) == packed.size
            assert np.array_equal(found[0], bitmap)
            assert np.array_equal(found[1], packed)
        else:
            assert np.array_equal(found, plane)

    def _launch_packing(
        self, library: cuemu.Lib, grid: int | None, packing: Packing, table: Any, out: Any
    ) -> None:
        if hasattr(library.dll, "cuemu_regions"):
            places = [place for planes in packing.places for place in planes]
            ours = [out[start:end] for place in places for start, end in _covered(place)]
            library.regions(*ours, readonly=[table, *self._planes()])
        arguments = [table, packing.count, packing.pieces]
        library.launch("pack_deltas", grid or packing.pieces, 256, arguments)

    def _launch(
        self, library: cuemu.Lib, name: str, grid: int | None, pieces: int | None, ours: list[Any]
    ) -> None:
        rows = self.survey.rows
        if hasattr(library.dll, "cuemu_regions"):
            library.regions(*ours, readonly=[self.table[: rows.nbytes], *self._planes()])
        sizes = [len(rows)] if pieces is None else [len(rows), pieces]
        library.launch(name, grid or sizes[-1], 256, [self.table, *sizes])

    def _planes(self) -> list[Any]:
        """The planes of both copies, up to a multiple of 4 bytes."""
        places = [place for at in range(len(self.chunks)) for place in self.layout.planes(at)]
        return [
            staged[place.start : -(-place.stop // 4) * 4]
            for staged in (self.now, self.old)
            for place in places
        ]

    def _check_untouched(self) -> None:
        assert all(map(untouched_around, (self.table, self.now, self.old)))
        assert np.array_equal(self.now, self._staged(self.raw, 0xAA))
        assert np.array_equal(self.old, self._staged(self.before, 0x55))


def _covered(place: Place) -> list[tuple[int, int]]:
    """What is written of a plane: words of it and of its bitmap's parts, and single bytes."""
    if place.packed is None or place.there is None:
        return [(place.start, place.start + -(-place.count // 4) * 4)]
    found, at = [(place.packed.start, place.packed.end)], place.start
    for segment in np.flatnonzero(place.there).tolist():
        bits = min(place.count - segment * 4096, 4096)
        found.append((at, at + -(-bits // 32) * 4))
        at += 512
    return [(start, end) for start, end in found if start < end]


def _changed(before: Any, chunk: Copy, rng: np.random.Generator) -> Any:
    elements = before.copy().view(f"<u{chunk.width}")
    step = rng.integers(-chunk.by, chunk.by + 1, elements.size)
    step[rng.random(elements.size) >= chunk.changed] = 0
    with np.errstate(over="ignore"):
        elements += step.astype(f"<i{chunk.width}").view(elements.dtype)
    return elements.view(np.uint8)
