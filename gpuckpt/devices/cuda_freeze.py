"""A GPU's tensors at one moment, held where they are; `cuda_copy` has those that are copied.

Either way chunks are split into planes, and their digests taken, by kernels on
gpuckpt's own stream; what is left for the host is to copy them out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from gpuckpt.apart import Flag
from gpuckpt.arena import Slot
from gpuckpt.devices import Arrived, Transfer, Wants, kernels
from gpuckpt.devices.merging import Span, merged
from gpuckpt.devices.peeking import bring, rounds
from gpuckpt.devices.room import Scratch
from gpuckpt.devices.stream import OwnStream
from gpuckpt.devices.tables import Addresses, Tables, fingerprints
from gpuckpt.spec import Chunk

R = TypeVar("R")


class CudaTransfer(Transfer[R]):
    """Work on gpuckpt's stream, and what must live until it has been done."""

    def __init__(self, stream: OwnStream, read: Callable[[], R], keep: object) -> None:
        """Of all that the stream has been given so far; `read` makes the result of it."""
        self._read, self._keep = read, keep
        self._stream, self._event = stream, stream.mark()

    def wait(self) -> R:
        """Wait for it; then what it needed may go."""
        self._stream.synchronize(self._event)
        self._keep = None
        return self._read()


class CudaHold:
    """Live tensors, read batch by batch as host memory allows, and then once more.

    The second reading takes digests alone: whoever changed something meanwhile
    is found out.
    """

    live = True

    def __init__(
        self,
        stream: OwnStream,
        tables: tuple[Tables, Tables],
        scratch: Scratch,
        *,
        addresses: Addresses,
        owners: Sequence[object],
    ) -> None:
        """`tables` are those of the batches and of the rereads."""
        self._stream, self._scratch, self._addresses = stream, scratch, addresses
        (self._tables, self._rereads), self._owners = tables, owners
        self._ended = Flag()
        self._brought: frozenset[Chunk] | None = None
        self._last = stream.mark()

    def download(
        self, batch: int, slot: Slot, wants: Wants | None = None
    ) -> Transfer[Sequence[Arrived]]:
        """Split the chunks in the device's scratch memory, and copy what is wanted of that."""
        tables, scratch, stream = self._tables, self._scratch, self._stream
        wanted = self._wanted(batch, slot, wants)
        summaries, planes = tables.spans(batch)
        end = summaries.nbytes
        room = slot.planes[: end + planes.nbytes]
        parts = merged([Span(0, end), *(part.after(end) for part in tables.parts(batch, wanted))])
        table = tables.group(batch, self._addresses, scratch.packed)
        with stream.turn, stream.steps("copy to the host"):
            scratch.gather(table, slot.raw, stream)
            kernels.filter_chunks(
                scratch.table, len(table.rows), table.leaves, scratch.staged, stream.stream
            )
            for part in parts:
                place = room[part.start : part.start + part.nbytes]
                stream.to_host(place, scratch.staged + part.start)
            found = room[:end].view(kernels.SUMMARY)
            places = _where(tables.starts(batch), wanted)
            return self._transfer(lambda: tables.arrived(batch, found, room[end:], places))

    def _wanted(self, batch: int, slot: Slot, wants: Wants | None) -> list[bool]:
        """Which chunks are wanted, by their digests, which the first call waits for.

        What changes between this look and the second one is found out by either.
        """
        chunks = self._tables.chunks(batch)
        if wants is None:
            return [True] * len(chunks)
        if self._brought is None:
            prints: dict[Chunk, str] = {}
            for at in range(self._rereads.groups):
                found = self.reread(at, slot).wait()
                prints.update(zip(self._rereads.chunks(at), found, strict=True))
            self._brought = wants.wanted(prints)
        return [chunk in self._brought for chunk in chunks]

    def peek(self, chunks: Sequence[Chunk], slot: Slot) -> list[bytes]:
        """A small copy each; nothing of a strided tensor, which only a kernel can gather."""
        found: list[bytes] = []
        for some in rounds(chunks, slot.planes):
            places = [self._tables.sources(chunk, self._addresses) for chunk in some]
            with self._stream.steps("look at some bytes"):
                transfer = self._transfer(bring(places, slot.planes, self._stream))
            found += transfer.wait()
        return found

    def reread(self, at: int, slot: Slot) -> Transfer[Sequence[str]]:
        """Take the digests of what is there now, and copy these."""
        tables, scratch, stream = self._rereads, self._scratch, self._stream
        table = tables.group(at, self._addresses, scratch.packed)
        room = slot.planes[: table.leaves * kernels.DIGEST_NBYTES]
        firsts, nbytes = table.rows["first_leaf"].tolist(), table.rows["nbytes"].tolist()
        with stream.turn, stream.steps("look for changes"):
            scratch.gather(table, slot.raw, stream)
            kernels.digest_chunks(
                scratch.table, len(table.rows), table.leaves, scratch.staged, stream.stream
            )
            stream.to_host(room, scratch.staged)
            return self._transfer(lambda: fingerprints(room.tobytes(), firsts, nbytes))

    def order_update(self) -> None:
        """Wait until the last read was given to the device; then the caller's streams wait for it.

        An event can't be waited for before it is recorded, which for the last
        read is only when host memory has taken the others.  A stream could be
        stopped until then, but not a caller who loads a kernel or frees memory
        meanwhile: CUDA has these wait for all streams, and whoever is to let
        the stopped one go on wait for them (ADR 0044).
        """
        self._ended.wait_out()
        with self._stream.used("order an update"):
            self._stream.lead_callers(self._last)

    def settle(self) -> None:
        """Nothing: there is no copy."""

    def end_downloads(self) -> None:
        """Let updates go on after all that was given to the device so far.

        If that is refused, `release` lets them go on, once nothing is read any more.
        """
        if self._ended.is_set():
            return
        with self._stream.used("end a snapshot"):
            self._last = self._stream.mark()
        self._ended.set()

    def release(self) -> None:
        """Let go of the tensors, and updates go on."""
        self._ended.set()
        self._owners = ()

    def _transfer(self, read: Callable[[], R]) -> CudaTransfer[R]:
        return CudaTransfer(self._stream, read, self._scratch.memory)


def _where(starts: Sequence[int], wanted: Sequence[bool]) -> list[int | None]:
    return [start if one else None for start, one in zip(starts, wanted, strict=True)]
