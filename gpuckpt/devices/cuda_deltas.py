"""Differences of a copy from the one before, taken on the device, of which few bytes cross."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gpuckpt.arena import Slot
from gpuckpt.devices import Bytes, Folded, Histograms, kernels
from gpuckpt.devices.pairs import (
    Place,
    Survey,
    lay_out_packing,
    lay_out_survey,
    packing_nbytes,
    survey_nbytes,
)
from gpuckpt.devices.room import Shadow
from gpuckpt.devices.stream import OwnStream
from gpuckpt.devices.tables import Tables
from gpuckpt.plan import BASED_NBYTES, aligned, area_nbytes

# A chunk's planes of differences, and the bytes that have come of them.
Difference = tuple[tuple[Folded, ...], int]


class DeltaRoom:
    """Memory for a survey, and for a slot's differences; kept from save to save."""

    def __init__(self, memory: Any, host: Bytes, area: int) -> None:
        """`memory` is a cupy array of `nbytes`, `host` page-locked and of `survey` bytes."""
        self.memory, self.host = memory, host
        self.table: int = memory.data.ptr
        self.packing = self.table + aligned(host.size)
        self.out = self.packing + aligned(packing_nbytes(area))

    @staticmethod
    def survey(tables: Tables) -> int:
        """Bytes for a survey of all chunks that may have a base."""
        rows = tables.layout.rows
        return survey_nbytes(rows[rows["nbytes"] >= BASED_NBYTES])

    @staticmethod
    def nbytes(tables: Tables, chunk_nbytes: int) -> int:
        """Bytes of the device's memory."""
        area = area_nbytes(chunk_nbytes)
        survey = aligned(DeltaRoom.survey(tables))
        return survey + aligned(packing_nbytes(area)) + area


class Deltas:
    """The differences of one copy's chunks from the copy before."""

    def __init__(
        self, stream: OwnStream, tables: Tables, room: DeltaRoom, now: Shadow, before: Shadow
    ) -> None:
        self._stream, self._tables, self._room = stream, tables, room
        self._prints = before.prints(tables)
        self._staged = now.staged(tables), before.staged(tables)
        self._survey: Survey | None = None
        self._rows: Mapping[int, int] = {}

    def is_base(self, chunk: int, known: str | None) -> bool:
        """Whether the copy before has, in a chunk's place, bytes of this fingerprint."""
        return known is not None and self._prints is not None and self._prints[chunk] == known

    def survey(self, chunks: Sequence[int]) -> dict[int, Histograms]:
        """Look at chunks' differences, by their positions among all; waits for the device."""
        if not chunks:
            return {}
        rows = self._tables.layout.rows[np.array(chunks, np.intp)]
        self._survey = survey = lay_out_survey(rows, *self._staged, self._room.table)
        self._rows = {at: row for row, at in enumerate(chunks)}
        table = self._room.host[: survey.rows.nbytes]
        table[:] = survey.rows.view(np.uint8)
        with self._stream.steps("look for differences"):
            stream, address = self._stream.stream, self._room.table
            self._stream.to_device(address, table)
            kernels.survey_deltas(address, len(survey.rows), survey.pieces, stream)
            kernels.sample_deltas(address, len(survey.rows), stream)
            self._stream.to_host(self._found, address + table.size)
            event = self._stream.mark()
        self._stream.synchronize(event)
        return {at: survey.histograms(self._found, row) for at, row in self._rows.items()}

    def pack(self, chunks: Sequence[int], slot: Slot) -> Callable[[], dict[int, Difference]]:
        """Begin to bring chunks' differences to a slot's `raw`; what gives them once they came."""
        survey, room = self._survey, self._room
        assert survey is not None, "survey comes first"
        picked = [self._rows[at] for at in chunks]
        counts = [survey.counts(self._found, row) for row in picked]
        packing = lay_out_packing(survey, picked, counts, room.packing, room.out)
        table = slot.raw[: packing.data.size]
        table[:] = packing.data
        # By way of the same place: on one stream the table has gone before they come.
        data = slot.raw[: packing.nbytes]
        assert data.size == packing.nbytes, "differences take no more than their chunks"
        self._stream.to_device(room.packing, table)
        kernels.pack_deltas(room.packing, packing.count, packing.pieces, self._stream.stream)
        self._stream.to_host(data, room.out)
        each = list(zip(chunks, packing.places, strict=True))
        return lambda: {at: _read(places, data) for at, places in each}

    @property
    def _found(self) -> Bytes:
        """What the survey says."""
        assert self._survey is not None, "survey comes first"
        return self._room.host[self._survey.rows.nbytes : self._survey.nbytes]


def _read(places: Sequence[Place], data: Bytes) -> Difference:
    planes = tuple(place.of(data) for place in places)
    return planes, sum(place.nbytes for place in places)
