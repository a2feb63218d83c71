"""Tensors in host memory: complete by itself, and the reference for `cuda`."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from gpuckpt.apart import Flag
from gpuckpt.arena import Slot
from gpuckpt.arrays import gather, host_view, scatter
from gpuckpt.devices import Arrived, Bytes, Done, Frozen, Piece, Transfer, Upload
from gpuckpt.errors import DeviceMemoryError
from gpuckpt.fingerprint import fingerprint
from gpuckpt.plan import Plan, aligned
from gpuckpt.spec import Chunk

R = TypeVar("R")


class CpuDevice:
    """The host as a `Device`: its stream is the caller's thread."""

    name = "cpu"

    def __init__(self) -> None:
        self._shadow: Bytes = np.empty(0, np.uint8)

    @property
    def kept_nbytes(self) -> int:
        """The memory for copies."""
        return self._shadow.size

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
        return np.empty(shape, dtype)

    def copy_nbytes(self, plan: Plan) -> int:
        """The tensors' bytes, each rounded up to a cache line."""
        return sum(aligned(plan.specs[tensor].nbytes) for tensor in plan.tensors)

    def has_room(self, nbytes: int) -> bool:  # noqa: ARG002
        """Always: the budget for host memory is the caller's to keep."""
        return True

    def reserve(self, nbytes: int) -> None:
        """Have memory for a copy, its pages touched."""
        if self._shadow.size < nbytes:
            self._shadow = np.empty(0, np.uint8)
            self._shadow = self.host_memory(nbytes)
            self._shadow[:: mmap.PAGESIZE] = 0

    def freeze(
        self,
        plan: Plan,
        addresses: npt.NDArray[np.uint64],
        owners: Sequence[object],
        *,
        copy: bool,
    ) -> Frozen:
        """Copy the tensors now, or hold them where they are."""
        if not copy:
            return CpuHold(plan, addresses, owners)
        self.reserve(self.copy_nbytes(plan))
        return CpuCopy(plan, self._copies(plan, addresses.tolist()))

    def begin_uploads(self, chunk_nbytes: int) -> None:
        """Nothing: the caller's thread has done what it was given."""

    def upload(self, pieces: Sequence[Piece], slot: Slot) -> Upload:
        """Chunks are put straight into targets that have their bytes one after the other."""
        return _CpuUpload(pieces, slot)

    def finish_uploads(self) -> None:
        """Nothing: uploads have been made when they return."""

    def _copies(self, plan: Plan, addresses: list[int]) -> dict[int, Bytes]:
        copies, offset = {}, 0
        base = self._shadow.ctypes.data
        for tensor in plan.tensors:
            spec = plan.specs[tensor]
            copies[tensor] = copied = self._shadow[offset : offset + spec.nbytes]
            if tensor in plan.strided:
                array = host_view(addresses[tensor], spec, plan.strides[tensor])
                np.copyto(copied.view(array.dtype).reshape(array.shape), array)
            elif spec.nbytes:
                ctypes.memmove(base + offset, addresses[tensor], spec.nbytes)
            offset += aligned(spec.nbytes)
        return copies


class CpuCopy:
    """Copies: the caller may change its arrays at once."""

    live = False

    def __init__(self, plan: Plan, copies: dict[int, Bytes]) -> None:
        self._plan, self._copies = plan, copies

    def download(self, batch: int, slot: Slot) -> Transfer[Sequence[Arrived]]:  # noqa: ARG002
        """They are where they belong."""
        copies = self._copies
        return Done([Arrived((_run(copies[c.tensor], c),)) for c in self._plan.batches[batch]])

    def reread(self, at: int, slot: Slot) -> Transfer[Sequence[str]]:  # noqa: ARG002
        """For completeness: nobody changes them."""
        copies, chunks = self._copies, self._plan.rereads[at]
        return _Later(lambda: [fingerprint(_run(copies[c.tensor], c).data) for c in chunks])

    def order_update(self) -> None:
        """Nothing: no live memory is read."""

    def settle(self) -> None:
        """Nothing: the copies were made at once."""

    def end_downloads(self) -> None:
        """Nothing: copies are read in place."""

    def release(self) -> None:
        """Give the copies' memory back to the device, which keeps it."""
        self._copies = {}


class CpuHold:
    """Live arrays: the caller's next update waits until all have been read."""

    live = True

    def __init__(
        self, plan: Plan, addresses: npt.NDArray[np.uint64], owners: Sequence[object]
    ) -> None:
        self._plan, self._addresses, self._owners = plan, addresses.tolist(), owners
        self._released = Flag()

    def download(self, batch: int, slot: Slot) -> Transfer[Sequence[Arrived]]:
        """The thread that waits for it copies."""
        chunks = self._plan.batches[batch]

        def work() -> list[Arrived]:
            places, arrived = _places(chunks, slot), []
            for chunk, place in zip(chunks, places, strict=True):
                gather(self._array(chunk), chunk.start, place)
                arrived.append(Arrived((place,)))
            return arrived

        return _Later(work)

    def reread(self, at: int, slot: Slot) -> Transfer[Sequence[str]]:
        """The thread that waits for it reads."""
        chunks = self._plan.rereads[at]

        def work() -> list[str]:
            found = []
            for chunk, place in zip(chunks, _places(chunks, slot), strict=True):
                array = self._array(chunk)
                if chunk.tensor in self._plan.strided:
                    gather(array, chunk.start, place)
                    found.append(fingerprint(place.data))
                else:
                    found.append(fingerprint(_run(array.reshape(-1).view(np.uint8), chunk).data))
            return found

        return _Later(work)

    def order_update(self) -> None:
        """Wait: on the host, the caller's thread is the stream.

        An interrupt is raised only after that: who handles it may change the state.
        """
        self._released.wait_out()

    def settle(self) -> None:
        """Nothing: there is no copy."""

    def end_downloads(self) -> None:
        """Nothing: on the host, downloads end when they have been waited for."""

    def release(self) -> None:
        """Let updates go on."""
        self._owners = ()
        self._released.set()

    def _array(self, chunk: Chunk) -> npt.NDArray[Any]:
        at = chunk.tensor
        return host_view(self._addresses[at], self._plan.specs[at], self._plan.strides[at])


class _CpuUpload:
    """Chunks that are decoded into their first target, or by way of the slot.

    The latter if it is strided, or if others are put into the same memory:
    then it would hold a mixture before it was looked at.
    """

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

    def start(self) -> Transfer[Sequence[Sequence[str]]]:
        """Do it all."""
        found = []
        for piece, (room,) in zip(self._pieces, self.rooms, strict=True):
            found.append([fingerprint(room.data)])
            for target in piece.targets[1:] if _is_filled_in_place(piece) else piece.targets:
                scatter(room, target.array, piece.start)
        return Done(found)


class _Later(Transfer[R]):
    """Work that the thread which waits for it does."""

    def __init__(self, work: Callable[[], R]) -> None:
        self._work = work

    def wait(self) -> R:
        """Do it."""
        return self._work()


def _is_filled_in_place(piece: Piece) -> bool:
    return piece.targets[0].contiguous and not piece.shared


def _places(chunks: Sequence[Chunk], slot: Slot) -> list[Bytes]:
    """Where in a slot's `raw` each chunk of a batch belongs."""
    places, offset = [], 0
    for chunk in chunks:
        places.append(slot.raw[offset : offset + chunk.nbytes])
        offset += aligned(chunk.nbytes)
    return places


def _run(data: Bytes, chunk: Chunk) -> Bytes:
    return data[chunk.start : chunk.start + chunk.nbytes]
