"""The runs of strided tensors that are gathered before other kernels read them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gpuckpt.devices.strided import PIECE_NBYTES, Run, Runs, lay_out_runs
from gpuckpt.dtypes import to_numpy
from gpuckpt.plan import Plan, aligned
from gpuckpt.spec import Chunk


class Gathered:
    """A run for each chunk of a strided tensor, in groups; made once for a plan.

    With `together`, the packed bytes of all groups lie side by side, else
    those of one group only.  They take at most `nbytes`.
    """

    def __init__(self, plan: Plan, groups: Sequence[Sequence[Chunk]], *, together: bool) -> None:
        self._plan = plan
        self.nbytes = offset = row = 0
        self._ends, self._chunks = [0], []
        rows, places = [], []
        for group in groups:
            offset = offset if together else 0
            for chunk in group:
                if chunk.tensor in plan.strided:
                    rows.append(row)
                    places.append(offset)
                    self._chunks.append(chunk)
                    offset += aligned(chunk.nbytes)
                row += 1
            self._ends.append(len(rows))
            self.nbytes = max(self.nbytes, offset)
        self._rows, self._places = np.array(rows, np.intp), np.array(places, np.uint64)
        self._tensors = np.array([chunk.tensor for chunk in self._chunks], np.intp)
        self.runs = lay_out_runs([self._run(chunk, 0, 0) for chunk in self._chunks]).rows

    def count(self, group: int) -> int:
        """How many runs a group has."""
        return self._ends[group + 1] - self._ends[group]

    def fill(
        self, groups: slice, addresses: npt.NDArray[np.uint64], packed: int
    ) -> tuple[npt.NDArray[np.intp], Runs]:
        """The rows (over all groups) whose bytes are gathered to `packed` …, and their runs."""
        part = slice(self._ends[groups.start], self._ends[groups.stop])
        runs = self.runs[part].copy()
        runs["tensor"] = addresses[self._tensors[part]]
        runs["packed"] = self._places[part] + np.uint64(packed)
        # The items that fit a tensor's shape and strides need not fit its address.
        for at in np.flatnonzero(runs["tensor"] % runs["itemsize"]).tolist():
            row, chunk = runs[at], self._chunks[part.start + at]
            (again,) = lay_out_runs([self._run(chunk, int(row["tensor"]), int(row["packed"]))]).rows
            again["first_piece"] = row["first_piece"]
            runs[at] = again
        pieces = sum(-(-chunk.nbytes // PIECE_NBYTES) for chunk in self._chunks[part])
        if len(runs):
            runs["first_piece"] -= runs["first_piece"][0]
        return self._rows[part], Runs(runs, pieces)

    def _run(self, chunk: Chunk, address: int, packed: int) -> Run:
        spec, strides = self._plan.specs[chunk.tensor], self._plan.strides[chunk.tensor]
        itemsize = to_numpy(spec.dtype).itemsize
        return Run(address, spec.shape, strides, itemsize, packed, chunk.start, chunk.nbytes)
