"""Device memory that is kept from save to save: for a copy of the state, and for chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from gpuckpt.devices import Bytes, kernels
from gpuckpt.devices.stream import OwnStream
from gpuckpt.devices.tables import Addresses, Table, Tables


class Scratch:
    """Device memory of three equal regions: tables, what is gathered, and what kernels write."""

    def __init__(self, memory: Any) -> None:
        """`memory` is a cupy array of bytes; nothing is done with it by two launches at once."""
        self.memory = memory
        self._region = memory.nbytes // 3
        self.table: int = memory.data.ptr
        self.packed, self.staged = (self.table + k * self._region for k in (1, 2))

    def put(self, tables: Sequence[Table], room: Bytes, stream: OwnStream) -> list[int]:
        """Bring tables to the device by way of page-locked `room`; their addresses there."""
        starts = list(accumulate((table.nbytes for table in tables), initial=0))
        for table, start in zip(tables, starts, strict=False):
            table.write(room[start:])
        stream.to_device(self.table, room[: starts[-1]])
        return [self.table + start for start in starts[:-1]]

    def takes(self, groups: range, tables: Tables) -> Iterator[range]:
        """Groups whose tables there is room for at a time."""
        start, room = groups.start, self._region
        for at in groups:
            room -= tables.table_nbytes(at)
            if room < 0 and at > start:
                yield range(start, at)
                start, room = at, self._region - tables.table_nbytes(at)
        yield range(start, groups.stop)


class Shadow:
    """Device memory for a copy: its table, what is gathered, and what kernels write.

    A state that lies where it lay at the last copy needs no other table.
    """

    def __init__(self, memory: Any) -> None:
        """`memory` is a cupy array of bytes."""
        self._memory = memory
        self.nbytes: int = memory.nbytes
        self.start: int = memory.data.ptr
        self._there: tuple[Tables, Addresses, Table] | None = None
        # The fingerprints of the chunks of the copy that was made last, once they are known.
        self.known: tuple[Tables, Sequence[str]] | None = None

    def table(self, tables: Tables, addresses: Addresses, room: Bytes, stream: OwnStream) -> Table:
        """The table of all chunks, brought to `start` by way of page-locked `room`.

        Unless it is there already.
        """
        if self._there is not None:
            before, where, table = self._there
            if before is tables and np.array_equal(where, addresses):
                return table
        self._there = None
        table = tables.whole(addresses, self.start + tables.rows_nbytes)
        stream.to_device(self.start, table.write(room))
        self._there = tables, addresses, table
        return table

    def prints(self, tables: Tables) -> Sequence[str] | None:
        """The fingerprints of its chunks, if it is a copy by these tables."""
        return self.known[1] if self.known is not None and self.known[0] is tables else None

    def staged(self, tables: Tables) -> int:
        """The address of what kernels write."""
        return self.start + tables.rows_nbytes + tables.packed_nbytes


def copy_nbytes(tables: Tables) -> int:
    """Room for a copy of all a plan's chunks, and what it takes to make it."""
    return tables.rows_nbytes + tables.packed_nbytes + tables.layout.staged_nbytes


def gather(table: Table, address: int, stream: OwnStream) -> None:
    """Gather the strided tensors of a table that lies at an address of the device."""
    runs = table.runs
    kernels.gather_runs(address + table.runs_at, len(runs.rows), runs.pieces, stream.stream)
