"""A GPU's tensors at one moment, held where they are; `cuda_copy` has those that are copied.

Either way chunks are split into planes, and their digests taken, by kernels on
gpuckpt's own stream; what is left for the host is to copy them out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from gpuckpt.apart import Flag
from gpuckpt.arena import Slot
from gpuckpt.devices import Arrived, Bytes, Transfer, Wants, kernels
from gpuckpt.devices.ahead import Ahead, Rooms
from gpuckpt.devices.merging import Span, merged
from gpuckpt.devices.peeking import bring, rounds
from gpuckpt.devices.room import Scratch, gather
from gpuckpt.devices.stream import OwnStream
from gpuckpt.devices.summaries import fingerprints
from gpuckpt.devices.tables import Addresses, Table, Tables
from gpuckpt.errors import DeviceError
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

    What has host memory of its own (`ahead`) is read at once.  The second
    reading takes digests alone: whoever changed something meanwhile is found
    out.
    """

    live = True

    def __init__(
        self,
        stream: OwnStream,
        tables: tuple[Tables, Tables],
        scratch: Scratch,
        ahead: tuple[Ahead, Bytes],
        *,
        addresses: Addresses,
        owners: Sequence[object],
    ) -> None:
        """`tables` are those of the batches and of the rereads; `ahead` is with its memory."""
        self._stream, self._scratch, self._addresses = stream, scratch, addresses
        (self._tables, self._rereads), self._owners = tables, owners
        self._ahead, self._memory = ahead
        self._ended, self._began = Flag(), False
        self._brought: frozenset[Chunk] | None = None
        self._batches: dict[int, Transfer[Sequence[Arrived]]] = {}
        self._looks: dict[int, Transfer[Sequence[str]]] = {}
        self._last = stream.mark()

    def bring(self, wants: Wants | None = None) -> None:
        """Begin to read all that has memory of its own; updates then wait for no slot."""
        ahead = self._ahead
        self._began = bool(ahead.batches.groups)
        if wants is not None and ahead.looks.groups:
            begun = self._begin(self._rereads, ahead.looks, self._look)
            self._want(wants, [transfer.wait() for transfer in begun.values()])
        self._batches = self._begin(self._tables, ahead.batches, self._read)
        if ahead.is_whole:
            self._looks = self._begin(self._rereads, ahead.looks, self._look)
            self.end_downloads()

    def download(
        self, batch: int, slot: Slot, wants: Wants | None = None
    ) -> Transfer[Sequence[Arrived]]:
        """Split the chunks in the device's scratch memory, and copy what is wanted of that.

        Unless that has begun.
        """
        if batch in self._batches:
            return self._batches.pop(batch)
        if wants is not None and self._brought is None:
            every = range(self._rereads.groups)
            prints = [self._by_slot(self._rereads, at, slot, self._look).wait() for at in every]
            self._want(wants, prints)
        return self._by_slot(self._tables, batch, slot, self._read)

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
        """Take the digests of what is there now, and copy these; unless that has begun."""
        if at in self._looks:
            return self._looks.pop(at)
        return self._by_slot(self._rereads, at, slot, self._look)

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

    def settle(self) -> bool:
        """Wait for what has begun, and let go of the tensors, if that was all of them."""
        if self._ahead.is_whole:
            self._stream.synchronize(self._last)
            self._owners = ()
        return self._ahead.is_whole

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
        """Let go of the tensors, once what was begun writes nothing any more; updates go on.

        The host writes the next save's tables to the memory that it would write to.
        """
        begun, self._began = self._began, False
        if begun:
            with contextlib.suppress(DeviceError):  # a lost device writes nothing
                self._stream.synchronize(self._stream.stream)
        self._batches, self._looks = {}, {}
        self._ended.set()
        self._owners = ()

    def _want(self, wants: Wants, prints: Sequence[Sequence[str]]) -> None:
        """Choose the chunks to read by their digests, of each reread's chunks.

        What changes between this look and the second one is found out by either.
        """
        every = [self._rereads.chunks(at) for at in range(self._rereads.groups)]
        found = (zip(*each, strict=True) for each in zip(every, prints, strict=True))
        self._brought = wants.wanted({chunk: one for each in found for chunk, one in each})

    def _begin(
        self, tables: Tables, rooms: Rooms, step: Callable[[int, Table, int, Bytes], Transfer[R]]
    ) -> dict[int, Transfer[R]]:
        """Begin a step for each group that has room of its own; many tables cross at a time."""
        begun, stream = {}, self._stream
        place = rooms.table.start
        for groups in self._scratch.takes(rooms.groups, tables) if rooms.groups else ():
            some = tables.each(groups, self._addresses, self._scratch.packed)
            with stream.turn, stream.steps("read at once"):
                addresses = self._scratch.put(some, self._memory[place:], stream)
                for at, table, address in zip(groups, some, addresses, strict=True):
                    begun[at] = step(at, table, address, rooms.at(at, self._memory))
            place += sum(table.nbytes for table in some)
        return begun

    def _by_slot(
        self,
        tables: Tables,
        at: int,
        slot: Slot,
        step: Callable[[int, Table, int, Bytes], Transfer[R]],
    ) -> Transfer[R]:
        """Begin a step by way of a slot."""
        table, stream = tables.group(at, self._addresses, self._scratch.packed), self._stream
        with stream.turn, stream.steps("read"):
            (address,) = self._scratch.put([table], slot.raw, stream)
            return step(at, table, address, slot.planes)

    def _read(
        self, batch: int, table: Table, address: int, room: Bytes
    ) -> Transfer[Sequence[Arrived]]:
        """Give the device a batch, to bring its summaries, and what is wanted of its planes."""
        tables, staged, stream = self._tables, self._scratch.staged, self._stream
        brought, chunks = self._brought, tables.chunks(batch)
        summaries, planes = tables.spans(batch)
        end = summaries.nbytes
        data, parts = room[: end + planes.nbytes], [Span(0, end + planes.nbytes)]
        wanted = [brought is None or chunk in brought for chunk in chunks]
        if not all(wanted):
            parts = [part.after(end) for part in tables.parts(batch, wanted)]
            parts = merged([Span(0, end), *parts])
        gather(table, address, stream)
        kernels.filter_chunks(address, len(table.rows), table.leaves, staged, stream.stream)
        for part in parts:
            stream.to_host(data[part.start : part.end], staged + part.start)

        def read() -> list[Arrived]:
            places = _where(tables.starts(batch), wanted)
            return tables.arrived(batch, data[:end].view(kernels.SUMMARY), data[end:], places)

        return self._transfer(read)

    def _look(
        self,
        at: int,  # noqa: ARG002
        table: Table,
        address: int,
        room: Bytes,
    ) -> Transfer[Sequence[str]]:
        """Give the device chunks, to take the digests of what is there now."""
        staged, stream = self._scratch.staged, self._stream
        data = room[: table.leaves * kernels.DIGEST_NBYTES]
        gather(table, address, stream)
        kernels.digest_chunks(address, len(table.rows), table.leaves, staged, stream.stream)
        stream.to_host(data, staged)

        def read() -> list[str]:
            firsts, nbytes = (table.rows[name].tolist() for name in ("first_leaf", "nbytes"))
            return fingerprints(data.tobytes(), firsts, nbytes)

        return self._transfer(read)

    def _transfer(self, read: Callable[[], R]) -> CudaTransfer[R]:
        return CudaTransfer(self._stream, read, self._scratch.memory)


def _where(starts: Sequence[int], wanted: Sequence[bool]) -> list[int | None]:
    return [start if one else None for start, one in zip(starts, wanted, strict=True)]
