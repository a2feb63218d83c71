"""A GPU's tensors at one moment, held where they are; `cuda_copy` has those that are copied.

Either way chunks are split into planes, and their digests taken, by kernels on
gpuckpt's own stream; what is left for the host is to copy them out.
"""

from __future__ import annotations

import _thread
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from gpuckpt.apart import Flag
from gpuckpt.arena import Slot
from gpuckpt.devices import Arrived, Transfer, Wants, kernels
from gpuckpt.devices.driver import Semaphore
from gpuckpt.devices.merging import Span, merged
from gpuckpt.devices.peeking import bring, rounds
from gpuckpt.devices.room import Scratch
from gpuckpt.devices.stream import OwnStream
from gpuckpt.devices.tables import Addresses, Tables, fingerprints
from gpuckpt.errors import DeviceError
from gpuckpt.spec import Chunk

R = TypeVar("R")

# With a stream of the caller's stopped, and nothing in its way: this long until something that
# is being copied must have arrived; and, since a disk may be slow, until something must be copied.
PATIENCE_SECONDS = 20.0
_IDLE_PATIENCE_SECONDS = 600.0
_LOOK_SECONDS = 0.05


class CudaTransfer(Transfer[R]):
    """Work on gpuckpt's stream, and what must live until it has been done."""

    def __init__(
        self,
        stream: OwnStream,
        read: Callable[[], R],
        keep: object,
        synchronize: Callable[[Any], None] | None = None,
    ) -> None:
        """Of all that the stream has been given so far; `read` makes the result of it."""
        self._read, self._keep = read, keep
        self._event = stream.mark()
        self._synchronize = synchronize or stream.synchronize

    def wait(self) -> R:
        """Wait for it; then what it needed may go."""
        self._synchronize(self._event)
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
        semaphore: Semaphore | None,
    ) -> None:
        """`tables` are those of the batches and of the rereads.

        Without a `semaphore`, updates wait on the host until the last read
        was given to the device.
        """
        self._stream, self._scratch, self._addresses = stream, scratch, addresses
        (self._tables, self._rereads), self._owners = tables, owners
        self._semaphore, self._ended = semaphore, Flag()
        self._given, self._arrived = 0, 0
        self._brought: frozenset[Chunk] | None = None
        self._lost_patience, self._watched, self._released = False, False, False
        self._begun = self._last = stream.mark()

    def download(
        self, batch: int, slot: Slot, wants: Wants | None = None
    ) -> Transfer[Sequence[Arrived]]:
        """Split the chunks in the device's scratch memory, and copy what is wanted of that."""
        tables, scratch, stream = self._tables, self._scratch, self._stream
        wanted = self._wanted(batch, slot, wants)
        self._given += 1
        summaries, planes = tables.spans(batch)
        end = summaries.nbytes
        room = slot.planes[: end + planes.nbytes]
        parts = merged([Span(0, end), *(part.after(end) for part in tables.parts(batch, wanted))])
        table = tables.group(batch, self._addresses, scratch.packed)
        with stream.turn, stream.steps("copy to the host", self._open):
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
            self._given += 1
            with self._stream.steps("look at some bytes", self._open):
                transfer = self._transfer(bring(places, slot.planes, self._stream))
            found += transfer.wait()
        return found

    def reread(self, at: int, slot: Slot) -> Transfer[Sequence[str]]:
        """Take the digests of what is there now, and copy these."""
        self._given += 1
        tables, scratch, stream = self._rereads, self._scratch, self._stream
        table = tables.group(at, self._addresses, scratch.packed)
        room = slot.planes[: table.leaves * kernels.DIGEST_NBYTES]
        firsts, nbytes = table.rows["first_leaf"].tolist(), table.rows["nbytes"].tolist()
        with stream.turn, stream.steps("look for changes", self._open):
            scratch.gather(table, slot.raw, stream)
            kernels.digest_chunks(
                scratch.table, len(table.rows), table.leaves, scratch.staged, stream.stream
            )
            stream.to_host(room, scratch.staged)
            return self._transfer(lambda: fingerprints(room.tobytes(), firsts, nbytes))

    def order_update(self) -> None:
        """Let the caller's streams wait for the last read; the host doesn't, given a semaphore.

        An event can't be waited for before it is recorded, which for the last
        read is only when host memory has taken the others; a semaphore can.
        """
        if not self._ended.is_set() and self._semaphore is not None:
            if not self._watched:
                _thread.start_new_thread(self._watch, (self._semaphore, self._semaphore.turn))
                self._watched = True
            with self._stream.used("order an update"):
                self._semaphore.stop_callers(self._stream.ordinal)
            return
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
            if self._semaphore is not None:
                self._semaphore.open_after(self._stream.stream)
        self._ended.set()

    def release(self) -> None:
        """Let go of the tensors, and updates go on.

        Even if `end_downloads` has seen to that: where streams share a queue, its
        opening may lie behind an update that came after the last read.
        """
        if not self._released:
            try:
                self._open()
            finally:
                self._ended.set()  # also if the device refuses: nobody waits for ever
            self._released = True
        self._owners = ()

    def _open(self) -> None:
        if self._semaphore is not None:
            self._semaphore.open_now()

    def _transfer(self, read: Callable[[], R]) -> CudaTransfer[R]:
        return CudaTransfer(self._stream, read, self._scratch.memory, self._synchronize)

    def _synchronize(self, event: Any) -> None:
        """Wait for a copy, and see that updates have waited for it too."""
        self._stream.synchronize(event)
        with self._stream.turn:
            self._arrived += 1
        self._check_patience()

    def _check_patience(self) -> None:
        if self._lost_patience:
            raise DeviceError(
                f"{self._stream.name}: nothing was copied for {PATIENCE_SECONDS:g} s while an "
                "update waited, so the update was let go and the save given up; from now on "
                "updates wait on the host, or pass snapshot='copy'"
            )

    def _watch(self, semaphore: Semaphore, turn: int) -> None:
        """See to it that no stream of the caller's stays stopped for ever: in a thread of its own.

        Whoever is stuck (a copy behind the stopped stream in a queue of the
        hardware, or a thread that frees memory, which waits for the device)
        can't do it.
        """
        seen, looks, begun = (-1, -1), 0, False
        with contextlib.suppress(DeviceError), self._stream.used("watch a snapshot"):
            while not semaphore.is_open(turn):
                now = (self._given, self._arrived)
                patience = PATIENCE_SECONDS if now[0] > now[1] else _IDLE_PATIENCE_SECONDS
                # Asked no more than needed: the driver, too, may be stuck.
                begun = begun or self._begun.done
                # Looks are counted, since clocks go on while a process is stopped.
                looks = looks + 1 if begun and now == seen else 0
                seen = now
                if looks * _LOOK_SECONDS > patience:
                    self._lost_patience = True
                    semaphore.open_now(broken=True)
                time.sleep(_LOOK_SECONDS)


def _where(starts: Sequence[int], wanted: Sequence[bool]) -> list[int | None]:
    return [start if one else None for start, one in zip(starts, wanted, strict=True)]
