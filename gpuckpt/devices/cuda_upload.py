"""Chunks on their way to a GPU: their planes are uploaded, joined there, and looked at again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpuckpt.arena import Slot
from gpuckpt.arrays import Tensor
from gpuckpt.devices import Bytes, Piece, Transfer, kernels
from gpuckpt.devices.cuda_freeze import CudaTransfer
from gpuckpt.devices.room import Scratch
from gpuckpt.devices.stream import OwnStream
from gpuckpt.devices.strided import Run, lay_out_runs
from gpuckpt.devices.summaries import fingerprints
from gpuckpt.devices.tables import Table
from gpuckpt.dtypes import to_numpy
from gpuckpt.layout import LEAF_NBYTES
from gpuckpt.plan import aligned, is_dense


class CudaUpload:
    """Room for the planes of some chunks, and the table by which kernels join them.

    A chunk has a row for each target whose bytes lie one after the other, and
    one for all its strided targets, which are scattered into from there.
    """

    wants_fingerprints = False

    def __init__(
        self, stream: OwnStream, scratch: Scratch, pieces: Sequence[Piece], slot: Slot
    ) -> None:
        self._stream, self._scratch, self._pieces, self._slot = stream, scratch, pieces, slot
        self._layout = kernels.lay_out(
            [piece.nbytes for piece in pieces],
            [piece.planes for piece in pieces],
            summaries=False,
        )
        self._layout.rows["turned"] = [piece.turned for piece in pieces]
        self.rooms: list[list[Bytes]] = [
            [slot.planes[place] for place in places] for places in self._layout.all_planes()
        ]

    def start(self, known: Sequence[str | None] = ()) -> Transfer[Sequence[Sequence[str]]]:  # noqa: ARG002
        """Upload, join, scatter, and take the digests of what was written."""
        table, counts = self._table()
        slot, stream, scratch = self._slot, self._stream, self._scratch
        nbytes = self._layout.staged_nbytes
        digests = scratch.table + table.nbytes
        found = slot.raw[table.nbytes :][: table.leaves * kernels.DIGEST_NBYTES]
        assert found.size == table.leaves * kernels.DIGEST_NBYTES, "more targets than a slot takes"
        firsts, lengths = table.rows["first_leaf"].tolist(), table.rows["nbytes"].tolist()

        def read() -> list[list[str]]:
            every = iter(fingerprints(found.tobytes(), firsts, lengths))
            return [[next(every) for _ in range(count)] for count in counts]

        with stream.turn, stream.steps("copy from the host"):
            stream.to_device(scratch.table, table.write(slot.raw))
            stream.to_device(scratch.staged, slot.planes[:nbytes])
            kernels.unfilter_chunks(
                *(scratch.table, len(table.rows), table.leaves, scratch.staged, digests),
                stream.stream,
            )
            runs = table.runs
            kernels.scatter_runs(
                scratch.table + table.runs_at, len(runs.rows), runs.pieces, stream.stream
            )
            stream.to_host(found, digests)
            return CudaTransfer(stream, read, (self._pieces, scratch.memory))

    def _table(self) -> tuple[Table, list[int]]:
        """Rows for every place that is written, and how many of them each piece has."""
        sources: list[int] = []
        places: list[int] = []
        scattered: list[Run] = []
        counts, packed = [], self._scratch.packed
        for at, piece in enumerate(self._pieces):
            writes, strided = list[int](), list[Tensor]()
            for one in piece.targets:
                if is_dense(one.spec, one.strides):
                    writes.append(one.address + piece.start)
                else:
                    strided.append(one)
            if strided:
                writes.append(packed)
                scattered += [_run(one, piece, packed) for one in strided]
                packed += aligned(piece.nbytes)
            counts.append(len(writes))
            sources += [at] * len(writes)
            places += writes
        rows = self._layout.rows[np.array(sources, np.intp)]
        rows["tensor"] = np.array(places, np.uint64)
        leaves = -(-rows["nbytes"].astype(np.int64) // LEAF_NBYTES)
        rows["first_leaf"] = np.cumsum(leaves) - leaves
        return Table(rows, int(leaves.sum()), lay_out_runs(scattered)), counts


def _run(target: Tensor, piece: Piece, packed: int) -> Run:
    spec = target.spec
    itemsize = to_numpy(spec.dtype).itemsize
    return Run(
        *(target.address, spec.shape, target.strides, itemsize),
        *(packed, piece.start, piece.nbytes),
    )
