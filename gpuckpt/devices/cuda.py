"""Tensors in a GPU's memory, by their addresses; kernels and copy engines do the work.

Everything runs on one non-blocking stream of gpuckpt's own.  Three events
order it with the caller's streams; the host waits for the second alone, with `hold`:

1. before a snapshot is read, gpuckpt's stream waits for the caller's;
2. before the caller updates what is being read, its streams wait for gpuckpt's;
3. after a restore, the caller's streams wait for the uploads.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from gpuckpt.arena import Slot
from gpuckpt.devices import Bytes, Frozen, Piece, Upload, kernels
from gpuckpt.devices.ahead import Ahead
from gpuckpt.devices.cuda_copy import CudaCopy
from gpuckpt.devices.cuda_deltas import DeltaRoom, Deltas
from gpuckpt.devices.cuda_freeze import CudaHold
from gpuckpt.devices.cuda_upload import CudaUpload
from gpuckpt.devices.driver import PageLocked
from gpuckpt.devices.room import Scratch, Shadow, copy_nbytes
from gpuckpt.devices.stream import OwnStream
from gpuckpt.devices.tables import Addresses, Tables
from gpuckpt.errors import DeviceMemoryError
from gpuckpt.plan import Plan, area_nbytes
from gpuckpt.statistics import byte_values

log = logging.getLogger("gpuckpt")

# Of the free memory, this much is left to the training run; and this much if bases are kept.
_HEADROOM = 0.1
_HEADROOM_BESIDE_BASES = 0.5
_LOCK_MORE = "pass a smaller memory=, or let the process lock more"


class CudaDevice:
    """One GPU as a `Device`."""

    def __init__(self, ordinal: int) -> None:
        self.name = f"cuda:{ordinal}"
        self._stream = OwnStream(self.name)
        self._shadow: Shadow | None = None
        self._older: Shadow | None = None
        self._deltas: tuple[Plan, DeltaRoom] | None = None
        self._scratch: Scratch | None = None
        self._rows: Bytes = np.empty(0, np.uint8)
        self._ahead: Bytes = np.empty(0, np.uint8)
        self._values: dict[str, tuple[Any, Bytes]] = {}
        self._copy: CudaCopy | None = None
        self._copying: tuple[Plan, Tables] | None = None
        self._holding: tuple[Plan, tuple[Tables, Tables]] | None = None
        with self._stream.used("load kernels"):
            kernels.load_kernels()

    @property
    def kept_nbytes(self) -> int:
        """The memory for copies and for differences between them, and the scratch memory."""
        memories = [one.memory for one in (self._scratch, self._deltas and self._deltas[1]) if one]
        shadows = [one for one in (self._shadow, self._older) if one is not None]
        return sum(int(one.nbytes) for one in (*memories, *shadows))

    @property
    def ahead_nbytes(self) -> int:
        """Page-locked memory for what is held."""
        return self._ahead.size

    def host_memory(self, nbytes: int) -> Bytes:
        """Page-locked memory of exactly `nbytes`, for all devices."""
        if not nbytes:
            return np.empty(0, np.uint8)
        with self._stream.used(f"allocate {nbytes} bytes of page-locked host memory", _LOCK_MORE):
            return np.asarray(PageLocked(nbytes))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """A new array from cupy's memory pool, for the caller's current stream."""
        nbytes = math.prod(shape) * dtype.itemsize
        remedy = "leave more memory free, or pass device='cpu'"
        with self._stream.used(f"allocate an array of {nbytes} bytes", remedy):
            return cupy.empty(shape, dtype)

    def copy_nbytes(self, plan: Plan) -> int:
        """The planes of all tensors, what kernels say of them, and what tables that takes."""
        return copy_nbytes(self._tables(plan))

    def has_room(self, nbytes: int) -> bool:
        """Whether it fits beside the caller's needs; asks the driver only if it isn't kept yet."""
        kept = 0 if self._shadow is None else self._shadow.nbytes
        return nbytes <= kept or nbytes <= kept + self.free_nbytes()

    def free_nbytes(self) -> int:
        """Free memory, the caller's memory pool's included, less a tenth for the training run."""
        with self._stream.used("ask for its memory"):
            free, _ = cupy.cuda.runtime.memGetInfo()
            return int((free + cupy.get_default_memory_pool().free_bytes()) * (1 - _HEADROOM))

    def reserve(self, nbytes: int) -> None:
        """Allocate memory for a copy, if the last one took less; that one must have been made."""
        if self._copy is not None:
            self._copy.settle()  # it was, but if an interrupt kept it from being saved
        if self._shadow is None or self._shadow.nbytes < nbytes:
            self._shadow = self._copy = None
            remedy = "pass snapshot='hold', or leave more memory free"
            memory = self._stream.allocate(nbytes, "a copy of the state", remedy)
            self._shadow = Shadow(memory)

    def keep_bases(self, plan: Plan) -> bool:
        """If two copies would take at most half of what would be free without any."""
        if self._deltas is not None and self._deltas[0] is plan:
            return True
        self._older = self._deltas = None
        tables = self._tables(plan)
        nbytes, more = copy_nbytes(tables), DeltaRoom.nbytes(tables, plan.chunk_nbytes)
        kept = 0 if self._shadow is None else self._shadow.nbytes
        free = self.free_nbytes() / (1 - _HEADROOM) + kept
        if not DeltaRoom.survey(tables) or 2 * nbytes + more > free * (1 - _HEADROOM_BESIDE_BASES):
            return False
        try:
            self.reserve(nbytes)
            memory = self._stream.allocate(more, "differences")
            host = self.host_memory(DeltaRoom.survey(tables))
            self._older = Shadow(self._stream.allocate(nbytes, "the copy before"))
        except DeviceMemoryError:
            return False
        self._deltas = plan, DeltaRoom(memory, host, area_nbytes(plan.chunk_nbytes))
        return True

    def freeze(
        self,
        plan: Plan,
        addresses: Addresses,
        owners: Sequence[object],
        *,
        copy: bool,
        host_nbytes: int = 0,
    ) -> Frozen:
        """Freeze tensors after the caller's current streams; returns before anything is read.

        All memory is allocated before: an allocation may wait for the whole
        device, and so for an update that waits for the snapshot.
        """
        if copy:
            self._ahead = np.empty(0, np.uint8)  # the budget may have no room for it any more
            tables = self._tables(plan)
            self.reserve(copy_nbytes(tables))
            if self._rows.size < tables.host_nbytes:
                self._rows = self.host_memory(tables.host_nbytes)
            with self._stream.used("take a snapshot"):
                self._stream.follow_callers()
            deltas = self._differences(plan, tables)
            assert self._shadow is not None, "reserved"
            self._copy = CudaCopy(
                *(self._stream, tables, self._shadow, self._rows, deltas),
                addresses=addresses,
                owners=owners,
            )
            self._copy.begin()
            return self._copy
        both, scratch = self._hold_tables(plan), self._reserved_scratch(plan.chunk_nbytes)
        ahead = self._reserved_ahead(host_nbytes, both)
        with self._stream.used("take a snapshot"):
            self._stream.follow_callers()
            return CudaHold(
                *(self._stream, both, scratch, ahead), addresses=addresses, owners=owners
            )

    def _differences(self, plan: Plan, tables: Tables) -> Deltas | None:
        """Of a copy that is to be made from the last one, if bases are kept: they take turns."""
        if self._deltas is None or self._deltas[0] is not plan:
            return None
        assert self._shadow is not None, "reserved"
        assert self._older is not None, "kept beside it"
        self._shadow, self._older = self._older, self._shadow
        return Deltas(self._stream, tables, self._deltas[1], self._shadow, self._older)

    def begin_uploads(self, chunk_nbytes: int) -> None:
        """Order uploads after the caller's current streams."""
        self._reserved_scratch(chunk_nbytes)
        with self._stream.used("begin to restore"):
            self._stream.follow_callers()

    def upload(self, pieces: Sequence[Piece], slot: Slot) -> Upload:
        """Chunks arrive as planes, which kernels join into their targets."""
        assert self._scratch is not None, "begin_uploads comes first"
        return CudaUpload(self._stream, self._scratch, pieces, slot)

    def finish_uploads(self) -> None:
        """Order the caller's current streams after the uploads."""
        with self._stream.used("finish restoring"):
            self._stream.lead_callers(self._stream.mark())

    def _tables(self, plan: Plan) -> Tables:
        """For a copy of a whole plan; those of the last one are kept."""
        if self._copying is None or self._copying[0] is not plan:
            tables = Tables(plan, plan.batches, self._values_at, together=True)
            self._copying = (plan, tables)
        return self._copying[1]

    def _hold_tables(self, plan: Plan) -> tuple[Tables, Tables]:
        """For a plan's batches and its rereads; those of the last one are kept."""
        if self._holding is None or self._holding[0] is not plan:
            batches = Tables(plan, plan.batches, self._values_at, together=False)
            rereads = Tables(plan, plan.rereads, self._values_at, together=False)
            self._holding = (plan, (batches, rereads))
        return self._holding[1]

    def _reserved_scratch(self, chunk_nbytes: int) -> Scratch:
        nbytes = 3 * area_nbytes(chunk_nbytes)
        if self._scratch is None or self._scratch.memory.nbytes < nbytes:
            self._scratch = None
            remedy = "pass a smaller chunk_nbytes=, or leave more memory free"
            memory = self._stream.allocate(nbytes, "chunks on their way", remedy)
            self._scratch = Scratch(memory)
        return self._scratch

    def _reserved_ahead(self, nbytes: int, tables: tuple[Tables, Tables]) -> tuple[Ahead, Bytes]:
        """Host memory within so many bytes for what is held; none where it can't be had."""
        ahead = Ahead.within(nbytes, *tables)
        if not nbytes:
            return ahead, self._ahead
        if not ahead.nbytes <= self._ahead.size <= nbytes:
            self._ahead = np.empty(0, np.uint8)
            try:
                self._ahead = self.host_memory(ahead.nbytes)
            except DeviceMemoryError as error:
                log.warning("held tensors are read as slots become free: %s", error)
                return Ahead(), self._ahead
        return ahead, self._ahead

    def _values_at(self, dtype: str) -> int:
        """The address of the 256 values of a type of one-byte floats; 0 for any other."""
        values = byte_values(dtype)
        if values is None:
            return 0
        if dtype not in self._values:
            data = self.host_memory(values.nbytes)
            data[:] = values.view(np.uint8)
            memory = self._stream.allocate(values.nbytes, "the values of a type")
            with self._stream.used("copy to the device"):
                self._stream.to_device(memory.data.ptr, data)
            self._values[dtype] = (memory, data)
        address: int = self._values[dtype][0].data.ptr
        return address
