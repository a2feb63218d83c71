"""The tables by which kernels find a plan's chunks, and where what they write lies.

Pure arithmetic over numpy arrays, made once for a plan.  Only addresses are
filled in at each use, for thousands of tensors in a few operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuckpt.devices import Arrived, Bytes, kernels
from gpuckpt.devices.gathered import Gathered
from gpuckpt.devices.merging import Span, merged
from gpuckpt.devices.strided import RUN, Runs
from gpuckpt.devices.summaries import Summaries, fingerprints, planes_of, statistics
from gpuckpt.plan import PLANE_ALIGNMENT, RUN_NBYTES, SUMMARY_NBYTES, Plan, aligned
from gpuckpt.spec import Chunk
from gpuckpt.statistics import kind_of

# What a plan reckons with.
assert kernels.ALIGNMENT == PLANE_ALIGNMENT
assert kernels.SUMMARY.itemsize == SUMMARY_NBYTES >= kernels.CHUNK.itemsize
assert RUN.itemsize <= RUN_NBYTES

Rows = npt.NDArray[Any]  # of kernels.CHUNK
Addresses = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows for one launch: chunks with so many leaves, and the runs that are gathered for them."""

    rows: Rows
    leaves: int
    runs: Runs

    @property
    def runs_at(self) -> int:
        """Where the runs begin: on a cache line after the rows."""
        return aligned(self.rows.nbytes)

    @property
    def nbytes(self) -> int:
        """Room for the rows and the runs."""
        return self.runs_at + aligned(self.runs.rows.nbytes)

    def write(self, room: Bytes) -> Bytes:
        """Put rows and runs into host memory; the part of `room` that they take."""
        for data, at in ((self.rows, 0), (self.runs.rows, self.runs_at)):
            room[at : at + data.nbytes] = data.view(np.uint8).reshape(-1)
        return room[: self.nbytes]


class Tables:
    """Everything about chunks, in groups, that doesn't depend on addresses.

    What kernels write for a group is, first, a summary of each leaf, then the
    planes; `spans` says where these lie if all groups are done at once.  With
    `together`, strided tensors of all groups are gathered side by side, else
    those of one group only.
    """

    def __init__(
        self,
        plan: Plan,
        groups: Sequence[Sequence[Chunk]],
        values: Callable[[str], int],
        *,
        together: bool,
    ) -> None:
        """`values` gives the address of a one-byte float type's values, or 0."""
        self._plan, self._groups = plan, groups
        self._chunks = chunks = [chunk for group in groups for chunk in group]
        widths = [plan.width(chunk) for chunk in chunks]
        self.layout = kernels.lay_out([chunk.nbytes for chunk in chunks], widths)
        dtypes = [plan.specs[chunk.tensor].dtype for chunk in chunks]
        kinds = {dtype: (kind_of(dtype), values(dtype)) for dtype in set(dtypes)}
        rows = self.layout.rows
        rows["kind"] = [kinds[dtype][0] for dtype in dtypes]
        rows["turned"] = [plan.turned(chunk) for chunk in chunks]
        rows["values"] = [kinds[dtype][1] for dtype in dtypes]
        self._tensor = np.array([chunk.tensor for chunk in chunks], np.intp)
        self._start = np.array([chunk.start for chunk in chunks], np.uint64)
        self._ends = np.cumsum([0, *(len(group) for group in groups)]).tolist()
        self._edges = self._edges_of(rows)
        self._strided = Gathered(plan, groups, together=together)

    @property
    def rows_nbytes(self) -> int:
        """Room for the rows and runs of all groups."""
        return aligned(self.layout.rows.nbytes) + aligned(self._strided.runs.nbytes)

    @property
    def summaries_nbytes(self) -> int:
        """Room for the summaries of all groups, which lie one after the other."""
        return self.layout.leaves * SUMMARY_NBYTES

    @property
    def host_nbytes(self) -> int:
        """Page-locked memory for rows and runs on their way there, then for summaries back."""
        return max(self.rows_nbytes, self.summaries_nbytes)

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return len(self._groups)

    def chunks(self, group: int) -> Sequence[Chunk]:
        """The chunks of a group."""
        return self._groups[group]

    @property
    def every_chunk(self) -> Sequence[Chunk]:
        """The chunks of all groups."""
        return self._chunks

    def positions(self, group: int) -> range:
        """Where a group's chunks are among those of all groups."""
        return range(self._ends[group], self._ends[group + 1])

    @property
    def packed_nbytes(self) -> int:
        """Room that gathered tensors take at most."""
        return self._strided.nbytes

    def leaves(self, group: int) -> int:
        """How many leaves a group's chunks have."""
        return self._edges[group + 1][0] - self._edges[group][0]

    def table_nbytes(self, group: int) -> int:
        """Room for the rows and runs of one group."""
        rows = self._ends[group + 1] - self._ends[group]
        return aligned(rows * kernels.CHUNK.itemsize) + aligned(
            self._strided.count(group) * RUN.itemsize
        )

    def spans(self, group: int) -> tuple[Span, Span]:
        """Where a group's summaries and its planes lie."""
        (first, planes), (end, planes_end) = self._edges[group : group + 2]
        return (
            Span(first * SUMMARY_NBYTES, (end - first) * SUMMARY_NBYTES),
            Span(planes, planes_end - planes),
        )

    def places(self, chunk: Chunk, staged: int) -> tuple[list[int], int, bool]:
        """Where planes of some bytes of a tensor's first chunk lie, how long, and if turned.

        By their addresses, if all groups' results begin at `staged`.
        """
        planes = self.layout.planes(self._firsts[chunk.tensor])
        ahead = staged + chunk.start // len(planes)
        addresses = [plane.start + ahead for plane in planes]
        return addresses, chunk.nbytes // len(planes), self._plan.turned(chunk)

    def sources(self, chunk: Chunk, addresses: Addresses) -> tuple[list[int], int, bool]:
        """Where some bytes of a live tensor lie, and how many; nowhere, if it is strided."""
        if chunk.tensor in self._plan.strided:
            return [], 0, False
        return [int(addresses[chunk.tensor]) + chunk.start], chunk.nbytes, False

    @cached_property
    def _firsts(self) -> dict[int, int]:
        """The row of each tensor's first chunk."""
        rows = np.flatnonzero(self._start == 0)
        return dict(zip(self._tensor[rows].tolist(), rows.tolist(), strict=True))

    def whole(self, addresses: Addresses, packed: int) -> Table:
        """Rows for all groups at once; gathered tensors go to the address `packed`."""
        return self._table(0, len(self._ends) - 1, addresses, packed)

    def group(self, at: int, addresses: Addresses, packed: int) -> Table:
        """Rows for one group, whose results lie at the beginning."""
        table = self._table(at, at + 1, addresses, packed)
        summaries, planes = self.spans(at)
        table.rows["first_leaf"] -= np.uint64(self._edges[at][0])
        table.rows["summaries"] -= np.uint64(summaries.start)
        table.rows["planes"] -= np.uint64(planes.start - summaries.nbytes)
        return table

    def each(self, groups: range, addresses: Addresses, packed: int) -> list[Table]:
        """As `group`, of several that follow each other; quickly, if none is strided."""
        if self._strided.nbytes or not groups:
            return [self.group(at, addresses, packed) for at in groups]
        whole = self._table(groups.start, groups.stop, addresses, packed)
        starts = self._ends[groups.start : groups.stop + 1]
        edges = np.array(self._edges[groups.start : groups.stop + 1], np.uint64)
        first, planes = np.repeat(edges[:-1], np.diff(starts), axis=0).T
        ahead = np.repeat(np.diff(edges[:, 0]), np.diff(starts)) * np.uint64(SUMMARY_NBYTES)
        whole.rows["first_leaf"] -= first
        whole.rows["summaries"] -= first * np.uint64(SUMMARY_NBYTES)
        whole.rows["planes"] -= planes - ahead
        cuts = np.split(whole.rows, np.array(starts[1:-1]) - starts[0])
        return [
            Table(rows, self.leaves(at), whole.runs) for at, rows in zip(groups, cuts, strict=True)
        ]

    def own(self, group: int, summaries: Summaries) -> Summaries:
        """A group's summaries among those of all groups."""
        return summaries[self._edges[group][0] : self._edges[group + 1][0]]

    def fingerprints(self, summaries: Summaries) -> list[str]:
        """Of the chunks of all groups, from the summaries of all."""
        rows = self.layout.rows
        digests = summaries["digest"].tobytes()
        return fingerprints(digests, rows["first_leaf"].tolist(), rows["nbytes"].tolist())

    def parts(self, group: int, wanted: Sequence[bool]) -> list[Span]:
        """Where the planes of the chunks that are wanted lie among those of a group; a few spans.

        What lies between may be among them.
        """
        rows = self.layout.rows[self._ends[group] : self._ends[group + 1]]
        sizes = (rows["stride"] * rows["width"]).tolist()
        each = zip(self.starts(group), sizes, wanted, strict=True)
        return merged(Span(start, size) for start, size, one in each if one)

    def starts(self, group: int) -> list[int]:
        """Where each chunk's planes begin among those of a group."""
        rows = self.layout.rows[self._ends[group] : self._ends[group + 1]]
        starts: list[int] = (rows["planes"].astype(np.intp) - self.spans(group)[1].start).tolist()
        return starts

    def arrived(
        self, group: int, found: Summaries, data: Bytes, places: Sequence[int | None]
    ) -> list[Arrived]:
        """A group's chunks, from its summaries and what has come of its planes: `data`, uint8.

        `places` says where in it each chunk's planes begin, None: they aren't there.
        """
        rows = self.layout.rows[self._ends[group] : self._ends[group + 1]]
        firsts = (rows["first_leaf"] - np.uint64(self._edges[group][0])).astype(np.intp)
        prints = fingerprints(found["digest"].tobytes(), firsts.tolist(), rows["nbytes"].tolist())
        counts = statistics(found, firsts, (rows["kind"] > 0).tolist())
        return [
            Arrived(() if start is None else planes_of(data, start, *shape), one, counted)
            for start, one, counted, *shape in zip(
                *(places, prints, counts),
                *(rows[name].tolist() for name in ("stride", "width", "nbytes")),
                strict=True,
            )
        ]

    def _edges_of(self, rows: Rows) -> list[tuple[int, int]]:
        """For each group its first leaf and where its planes begin, and where the last ends."""
        firsts = [*rows["first_leaf"].tolist(), self.layout.leaves]
        planes = [*rows["planes"].tolist(), self.layout.staged_nbytes]
        return [(firsts[row], planes[row]) for row in self._ends]

    def _table(self, low: int, high: int, addresses: Addresses, packed: int) -> Table:
        part = slice(self._ends[low], self._ends[high])
        rows = self.layout.rows[part].copy()
        rows["tensor"] = addresses[self._tensor[part]] + self._start[part]
        places, runs = self._strided.fill(slice(low, high), addresses, packed)
        rows["tensor"][places - part.start] = runs.rows["packed"]
        return Table(rows, self._edges[high][0] - self._edges[low][0], runs)
