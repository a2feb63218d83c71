"""Tensors in host memory: complete by itself, and the reference for `cuda`."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuckpt.arena import Slot
from gpuckpt.arrays import scatter
from gpuckpt.devices import Bytes, Done, Frozen, Piece, Transfer, Upload
from gpuckpt.devices.cpu_freeze import CpuCopy, CpuHold, Places
from gpuckpt.errors import DeviceMemoryError
from gpuckpt.fingerprint import fingerprint
from gpuckpt.plan import Plan, aligned


class CpuDevice:
    """The host as a `Device`: its stream is the caller's thread."""

    name = "cpu"

    def __init__(self) -> None:
        self._shadow: Bytes = np.empty(0, np.uint8)
        self._places: Places | None = None

    @property
    def kept_nbytes(self) -> int:
        """The memory for copies."""
        return self._shadow.size

    @property
    def ahead_nbytes(self) -> int:
        """None: what is held is on the host."""
        return 0

    def host_memory(self, nbytes: int) -> Bytes:
        """Memory in huge pages where the system has them, none of them touched yet.

        A copy into pages that are touched for the first time takes three to
        eight times as long as the next one; so it is taken once and kept.
        """
        if not nbytes:
            return np.empty(0, np.uint8)
        try:
            pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, MemoryError) as error:
            raise DeviceMemoryError(
                f"the host has no {nbytes} bytes left ({error}); pass a smaller memory="
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(pages, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """A new array."""
        try:
            return np.empty(shape, dtype)
        except MemoryError as error:
            raise DeviceMemoryError(f"the host refuses memory: {error}") from error

    def copy_nbytes(self, plan: Plan) -> int:
        """The bytes of what has to be copied, each tensor's rounded up to a cache line."""
        return self._placed(plan).nbytes

    def has_room(self, nbytes: int) -> bool:  # noqa: ARG002
        """Always: the budget for host memory is the caller's to keep."""
        return True

    def reserve(self, nbytes: int) -> None:
        """Have memory for a copy, its pages touched."""
        if self._shadow.size < nbytes:
            self._shadow = np.empty(0, np.uint8)
            self._shadow = self.host_memory(nbytes)
            self._shadow[:: mmap.PAGESIZE] = 0

    def keep_bases(self, plan: Plan) -> bool:  # noqa: ARG002
        """No: what the host keeps for any device is kept by chunks (`bases`)."""
        return False

    def freeze(
        self,
        plan: Plan,
        addresses: npt.NDArray[np.uint64],
        owners: Sequence[object],
        *,
        copy: bool,
        host_nbytes: int = 0,  # noqa: ARG002 - what is held is host memory
    ) -> Frozen:
        """Copy the tensors now, or hold them where they are; those that can't change, in any case.

        If none can change, updates needn't wait though nothing was copied.
        """
        places = self._placed(plan)
        if not copy:
            self._shadow = np.empty(0, np.uint8)  # the budget may have no room for it any more
            if len(places.kept) < len(plan.tensors):
                return CpuHold(plan, addresses, owners)
        self.reserve(places.nbytes)
        places.copy(addresses, self._shadow)
        return CpuCopy(places, self._shadow, addresses, owners)

    def begin_uploads(self, chunk_nbytes: int) -> None:
        """Nothing: the caller's thread has done what it was given."""

    def upload(self, pieces: Sequence[Piece], slot: Slot) -> Upload:
        """Chunks are put straight into targets that have their bytes one after the other."""
        return _CpuUpload(pieces, slot)

    def finish_uploads(self) -> None:
        """Nothing: uploads have been made when they return."""

    def _placed(self, plan: Plan) -> Places:
        """Where copies belong; what was found out of the last plan is kept."""
        if self._places is None or self._places.plan is not plan:
            self._places = Places(plan)
        return self._places


class _CpuUpload:
    """Chunks that are decoded into their first target, or by way of the slot.

    The latter if it is strided, or if others are put into the same memory:
    then it would hold a mixture before it was looked at.
    """

    wants_fingerprints = True

    def __init__(self, pieces: Sequence[Piece], slot: Slot) -> None:
        self._pieces, self.rooms = pieces, []
        offset = 0
        for piece in pieces:
            if _is_filled_in_place(piece):
                flat = piece.targets[0].array.reshape(-1).view(np.uint8)
                self.rooms.append([flat[piece.start : piece.start + piece.nbytes]])
            else:
                self.rooms.append([slot.raw[offset : offset + piece.nbytes]])
                offset += aligned(piece.nbytes)

    def start(self, known: Sequence[str | None] = ()) -> Transfer[Sequence[Sequence[str]]]:
        """Do it all.

        What is scattered is looked at after that, though who read it has looked
        at it: a slot's bytes may have changed since.
        """
        found = []
        for at, (piece, (room,)) in enumerate(zip(self._pieces, self.rooms, strict=True)):
            targets = piece.targets[1:] if _is_filled_in_place(piece) else piece.targets
            for target in targets:
                scatter(room, target.array, piece.start)
            taken = known[at] if known and not targets else None
            found.append([taken or fingerprint(room.data)])
        return Done(found)


def _is_filled_in_place(piece: Piece) -> bool:
    return piece.targets[0].contiguous and not piece.shared
