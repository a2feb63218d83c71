"""Host tensors at one moment: copied, or held where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from gpuckpt.apart import Flag
from gpuckpt.arena import Slot
from gpuckpt.arrays import gather, host_bytes, host_view
from gpuckpt.copying import copy_shares, share_out
from gpuckpt.devices import Arrived, Bytes, Done, Transfer, Wants
from gpuckpt.fingerprint import fingerprint
from gpuckpt.plan import Plan, aligned
from gpuckpt.spec import Chunk

R = TypeVar("R")


class Places:
    """Where the copies of a plan's tensors belong, one after the other, on cache lines.

    `kept` are those that need no copy, since JAX's arrays never change.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.kept = frozenset(
            at for at in plan.tensors if plan.specs[at].kind == "jax" and at not in plan.strided
        )
        copied = [tensor for tensor in plan.tensors if tensor not in self.kept]
        sizes = [plan.specs[tensor].nbytes for tensor in copied]
        starts = accumulate(map(aligned, sizes), initial=0)
        self.offsets = dict(zip(copied, starts, strict=False))
        self.nbytes = sum(map(aligned, sizes))
        dense = [tensor for tensor in copied if tensor not in plan.strided]
        self._dense = np.array(dense, np.intp)
        self._offsets = np.array([self.offsets[tensor] for tensor in dense], np.uint64)
        self._shares = share_out([plan.specs[tensor].nbytes for tensor in dense])

    def copy(self, addresses: npt.NDArray[np.uint64], room: Bytes) -> None:
        """Copy the tensors that lie at these addresses."""
        targets = self._offsets + np.uint64(room.ctypes.data)
        copy_shares(self._shares, targets, addresses[self._dense])
        for tensor in self.plan.strided:
            spec, strides = self.plan.specs[tensor], self.plan.strides[tensor]
            array = host_view(int(addresses[tensor]), spec, strides)
            copied = room[self.offsets[tensor] :][: spec.nbytes]
            np.copyto(copied.view(array.dtype).reshape(array.shape), array)

    def part(self, chunk: Chunk, room: Bytes) -> Bytes:
        """A chunk of a copy."""
        return room[self.offsets[chunk.tensor] + chunk.start :][: chunk.nbytes]


class CpuCopy:
    """Copies, and what can't change as it is: the caller may go on at once."""

    live = False

    def __init__(
        self,
        places: Places,
        room: Bytes,
        addresses: npt.NDArray[np.uint64],
        owners: Sequence[object],
    ) -> None:
        """`owners` keep what isn't copied alive."""
        self._plan, self._places, self._room = places.plan, places, room
        self._addresses = addresses.tolist() if places.kept else []
        self._owners = tuple(owners) if places.kept else ()

    def download(
        self,
        batch: int,
        slot: Slot,  # noqa: ARG002
        wants: Wants | None = None,  # noqa: ARG002
    ) -> Transfer[Sequence[Arrived]]:
        """They are where they belong."""
        return Done([Arrived((self._part(chunk),)) for chunk in self._plan.batches[batch]])

    def peek(self, chunks: Sequence[Chunk], slot: Slot) -> list[bytes]:  # noqa: ARG002
        """They are here already."""
        return [self._part(chunk).tobytes() for chunk in chunks]

    def reread(self, at: int, slot: Slot) -> Transfer[Sequence[str]]:  # noqa: ARG002
        """For completeness: nobody changes them."""
        chunks = self._plan.rereads[at]
        return _Later(lambda: [fingerprint(self._part(chunk).data) for chunk in chunks])

    def order_update(self) -> None:
        """Nothing: nothing is read that an update changes."""

    def bring(self, wants: Wants | None = None) -> None:
        """Nothing: they are on the host."""

    def settle(self) -> bool:
        """Nothing to wait for: the copies were made at once."""
        return True

    def end_downloads(self) -> None:
        """Nothing: copies are read in place."""

    def release(self) -> None:
        """Give the copies' memory back to the device, which keeps it, and let go of the rest."""
        self._room, self._addresses = np.empty(0, np.uint8), []
        self._owners = ()

    def _part(self, chunk: Chunk) -> Bytes:
        if chunk.tensor in self._places.kept:
            address = self._addresses[chunk.tensor] + chunk.start
            # With its owner: the snapshot may be released before this was written.
            return host_bytes(address, chunk.nbytes, self._owners)
        return self._places.part(chunk, self._room)


class CpuHold:
    """Live arrays: the caller's next update waits until all have been read."""

    live = True

    def __init__(
        self, plan: Plan, addresses: npt.NDArray[np.uint64], owners: Sequence[object]
    ) -> None:
        self._plan, self._addresses, self._owners = plan, addresses.tolist(), owners
        self._released = Flag()

    def download(
        self,
        batch: int,
        slot: Slot,
        wants: Wants | None = None,  # noqa: ARG002 - who would take the fingerprints reads all
    ) -> Transfer[Sequence[Arrived]]:
        """The thread that waits for it copies."""
        chunks = self._plan.batches[batch]

        def work() -> list[Arrived]:
            places, arrived = _places(chunks, slot), []
            for chunk, place in zip(chunks, places, strict=True):
                gather(self._array(chunk), chunk.start, place)
                arrived.append(Arrived((place,)))
            return arrived

        return _Later(work)

    def peek(self, chunks: Sequence[Chunk], slot: Slot) -> list[bytes]:
        """Copied one by one."""
        found = []
        for chunk in chunks:
            place = slot.raw[: chunk.nbytes]
            gather(self._array(chunk), chunk.start, place)
            found.append(place.tobytes())
        return found

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

    def bring(self, wants: Wants | None = None) -> None:
        """Nothing: they are on the host."""

    def settle(self) -> bool:
        """Nothing to wait for: there is no copy, and what is held is read until the end."""
        return False

    def end_downloads(self) -> None:
        """Nothing: on the host, downloads end when they have been waited for."""

    def release(self) -> None:
        """Let updates go on."""
        self._owners = ()
        self._released.set()

    def _array(self, chunk: Chunk) -> npt.NDArray[Any]:
        at = chunk.tensor
        return host_view(self._addresses[at], self._plan.specs[at], self._plan.strides[at])


class _Later(Transfer[R]):
    """Work that the thread which waits for it does, once."""

    def __init__(self, work: Callable[[], R]) -> None:
        self._work: Callable[[], R] | None = work
        self._result: R

    def wait(self) -> R:
        """Do it; again for a result that is there reads nothing, for what was read may be gone."""
        if self._work is not None:
            self._result, self._work = self._work(), None
        return self._result


def _places(chunks: Sequence[Chunk], slot: Slot) -> list[Bytes]:
    """Where in a slot's `raw` each chunk of a batch belongs."""
    places, offset = [], 0
    for chunk in chunks:
        places.append(slot.raw[offset : offset + chunk.nbytes])
        offset += aligned(chunk.nbytes)
    return places


def _run(data: Bytes, chunk: Chunk) -> Bytes:
    return data[chunk.start : chunk.start + chunk.nbytes]
