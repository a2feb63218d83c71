"""A GPU's tensors at one moment, copied on the device.

What differs little from the copy before is brought as that difference, what
hasn't changed not at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from gpuckpt.arena import Slot
from gpuckpt.devices import Arrived, Bytes, Transfer, Wants, kernels
from gpuckpt.devices.cuda_deltas import Deltas, Difference
from gpuckpt.devices.cuda_freeze import CudaTransfer
from gpuckpt.devices.merging import moved
from gpuckpt.devices.peeking import bring, rounds
from gpuckpt.devices.room import Shadow, gather
from gpuckpt.devices.stream import OwnStream
from gpuckpt.devices.summaries import Summaries
from gpuckpt.devices.tables import Addresses, Tables
from gpuckpt.errors import DeviceError
from gpuckpt.spec import Chunk

# How a chunk comes to the host.
_WHOLE, _DELTA, _BOTH, _NOT_AT_ALL = "whole", "delta", "both", "not at all"
_WITH_PLANES, _WITH_DELTA = (_WHOLE, _BOTH), (_DELTA, _BOTH)


class CudaCopy:
    """Copies on the device, made as soon as the caller's streams have come this far.

    One launch over all chunks makes them, split into planes already: what is
    left are plain copies to the host, which leave the device's cores alone.
    """

    live = False

    def __init__(
        self,
        stream: OwnStream,
        tables: Tables,
        shadow: Shadow,
        rows: Bytes,
        deltas: Deltas | None,
        *,
        addresses: Addresses,
        owners: Sequence[object],
    ) -> None:
        """`shadow` has `copy_nbytes`, `rows` is page-locked and has `host_nbytes` bytes.

        With `deltas`, differences are taken from the copy before.
        """
        self._stream, self._tables, self._owners = stream, tables, owners
        self._shadow: Shadow | None = shadow
        self._rows, self._addresses = rows, addresses
        self._staged = shadow.staged(tables)
        self._made: Any = None
        self._found: tuple[Summaries, list[str]] | None = None
        self._ways: list[str] | None = None
        self._wants: Wants | None = None
        self._deltas = deltas

    def begin(self) -> None:
        """Give the device its work; until it has been done, this must not be let go of."""
        stream, shadow = self._stream, self._shadow
        assert shadow is not None, "released"
        shadow.known = None
        with stream.steps("take a snapshot"):
            table = shadow.table(self._tables, self._addresses, self._rows, stream)
            gather(table, shadow.start, stream)
            kernels.filter_chunks(
                shadow.start, len(table.rows), table.leaves, self._staged, stream.stream
            )
            self._made = stream.mark()

    def download(
        self, batch: int, slot: Slot, wants: Wants | None = None
    ) -> Transfer[Sequence[Arrived]]:
        """A few copies: planes of chunks, and what chunks differ from the copy before by.

        Planes lie side by side in the slot's `planes`, differences in its `raw`.
        """
        tables, planes = self._tables, self._tables.spans(batch)[1]
        summaries, ways = self._chosen(wants)
        mine = [(at, ways[at]) for at in tables.positions(batch)]
        parts = tables.parts(batch, [way in _WITH_PLANES for _, way in mine])
        places = [
            moved(start, parts) if way in _WITH_PLANES else None
            for start, (_, way) in zip(tables.starts(batch), mine, strict=True)
        ]
        with self._stream.steps("copy to the host"):
            end = 0
            for part in parts:
                room = slot.planes[end : end + part.nbytes]
                self._stream.to_host(room, self._staged + planes.start + part.start)
                end += part.nbytes
            packed = self._packed([at for at, way in mine if way in _WITH_DELTA], slot)

            def read() -> list[Arrived]:
                found = tables.own(batch, summaries)
                arrived = tables.arrived(batch, found, slot.planes, places)
                for at, (delta, nbytes) in packed().items():
                    one = at - tables.positions(batch).start
                    arrived[one] = replace(arrived[one], delta=delta, delta_nbytes=nbytes)
                return arrived

            return CudaTransfer(self._stream, read, self._shadow)

    def _chosen(self, wants: Wants | None) -> tuple[Summaries, list[str]]:
        """What the device says of all chunks, and how each is to come; the first call waits.

        So does the first one with other wants: the copies are read again.
        """
        summaries, prints = self._look()
        if self._ways is None or wants is not self._wants:
            self._wants = wants
            chunks = self._tables.every_chunk
            self._ways = [_WHOLE] * len(chunks)
            if wants is not None:
                wanted = wants.wanted(dict(zip(chunks, prints, strict=True)))
                self._ways = [_WHOLE if chunk in wanted else _NOT_AT_ALL for chunk in chunks]
                for at in self._differing(self._ways, prints, wants):
                    self._ways[at] = _BOTH if wants.rounds(chunks[at]) else _DELTA
        return summaries, self._ways

    def _differing(self, ways: Sequence[str], prints: Sequence[str], wants: Wants) -> list[int]:
        """The chunks that have changed and whose difference from the copy before pays."""
        if self._deltas is None:
            return []
        chunks, is_base = self._tables.every_chunk, self._deltas.is_base
        bases = ((at, wants.base(chunks[at])) for at, way in enumerate(ways) if way == _WHOLE)
        found = self._deltas.survey(
            [at for at, base in bases if base != prints[at] and is_base(at, base)]
        )
        return [at for at, seen in found.items() if wants.pays(chunks[at], seen)]

    def _packed(self, chunks: Sequence[int], slot: Slot) -> Callable[[], dict[int, Difference]]:
        """Begin to bring chunks' differences to a slot."""
        if self._deltas is None or not chunks:
            return dict
        return self._deltas.pack(chunks, slot)

    def _look(self) -> tuple[Summaries, list[str]]:
        """What the device says of all chunks, and their fingerprints; the first call waits."""
        if self._found is None:
            room = self._rows[: self._tables.summaries_nbytes]
            with self._stream.steps("look at a snapshot"):
                self._stream.to_host(room, self._staged)
                event = self._stream.mark()
            self._stream.synchronize(event)
            summaries = room.view(kernels.SUMMARY)
            self._found = summaries, self._tables.fingerprints(summaries)
            if self._shadow is not None:
                self._shadow.known = self._tables, self._found[1]
        return self._found

    def peek(self, chunks: Sequence[Chunk], slot: Slot) -> list[bytes]:
        """A small copy for each plane."""
        found: list[bytes] = []
        for some in rounds(chunks, slot.planes):
            places = [self._tables.places(chunk, self._staged) for chunk in some]
            with self._stream.steps("look at some bytes"):
                read = bring(places, slot.planes, self._stream)
                transfer = CudaTransfer(self._stream, read, self._shadow)
            found += transfer.wait()
        return found

    def reread(self, at: int, slot: Slot) -> Transfer[Sequence[str]]:
        """Nobody changes copies."""
        raise AssertionError(at, slot)

    def order_update(self) -> None:
        """Let the caller's streams wait for the copies; the host doesn't."""
        with self._stream.used("order an update"):
            self._stream.lead_callers(self._made)

    def bring(self, wants: Wants | None = None) -> None:
        """Nothing: copies wait for slots without being in anybody's way."""

    def settle(self) -> bool:
        """Wait for the copies; only then may the sources' memory be used again."""
        if self._owners:
            # No event: an interrupt came before it was made, but not before the rest.
            self._stream.synchronize(self._made or self._stream.stream)
            self._owners = ()
        return True

    def end_downloads(self) -> None:
        """Nothing: downloads read the copies."""

    def release(self) -> None:
        """Let go of the copies, whose memory the device keeps."""
        with contextlib.suppress(DeviceError):  # a lost device copies nothing any more
            self.settle()
        self._owners, self._shadow, self._deltas = (), None, None
