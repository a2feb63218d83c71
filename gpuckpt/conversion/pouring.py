"""A source as a snapshot, so that the engine saves it like any state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from gpuckpt.arena import Slot
from gpuckpt.conversion.port import Bytes, Source
from gpuckpt.devices import Arrived, Done, Transfer, Wants
from gpuckpt.dtypes import to_numpy
from gpuckpt.errors import CorruptError
from gpuckpt.inventory import Inventory, Roster, Snapshot
from gpuckpt.plan import Plan, aligned, make_plans
from gpuckpt.spec import Chunk, Spec


def snapshot_of(source: Source, chunk_nbytes: int) -> Snapshot:
    """A snapshot that reads its chunks from a source, one after the other, when they are wanted."""
    outline = source.outline
    specs, strides = outline.specs, [_strides(spec) for spec in outline.specs]
    roster = Roster(outline.structure, specs, tuple(strides))
    here = [replace(spec, device="cpu") for spec in specs]
    by_device = {"cpu": range(len(specs))} if specs else {}
    plans = make_plans(here, strides, by_device, chunk_nbytes=chunk_nbytes, split=True)
    inventory = Inventory(roster, np.zeros(len(specs), np.uint64), [], ())
    frozen = {name: Poured(plan, source) for name, plan in plans.items()}
    return Snapshot(inventory, plans, dict(frozen))


class Poured:
    """Tensors that come out of a source; a `Frozen` of the host, of which nothing is live."""

    live = False

    def __init__(self, plan: Plan, source: Source) -> None:
        """Each tensor is read once, in the order of the plan's chunks."""
        self._plan, self._source = plan, source
        self._stream = Stream(source, -1)

    def download(
        self,
        batch: int,
        slot: Slot,
        wants: Wants | None = None,  # noqa: ARG002 - whoever reads takes all
    ) -> Transfer[Sequence[Arrived]]:
        """Read a batch's chunks to the slot, in the thread that asks."""
        arrived, offset = [], 0
        for chunk in self._plan.batches[batch]:
            if chunk.start == 0:
                self._stream.end()
                self._stream = Stream(self._source, chunk.tensor)
            place = slot.raw[offset : offset + chunk.nbytes]
            self._stream.fill(place)
            arrived.append(Arrived((place,)))
            offset += aligned(chunk.nbytes)
        if batch == len(self._plan.batches) - 1:
            self._finish()
        return Done(arrived)

    def peek(self, chunks: Sequence[Chunk], slot: Slot) -> list[bytes]:
        """Read tensors from their beginning, as far as it takes."""
        found = []
        for chunk in chunks:
            stream, room = Stream(self._source, chunk.tensor), slot.raw
            stream.fill(room[: chunk.start + chunk.nbytes])
            found.append(room[chunk.start : chunk.start + chunk.nbytes].tobytes())
            stream.close()
        return found

    def reread(self, at: int, slot: Slot) -> Transfer[Sequence[str]]:  # noqa: ARG002
        """Nothing: nobody changes what is read."""
        return Done(())

    def order_update(self) -> None:
        """Nothing: no live memory is read."""

    def bring(self, wants: Wants | None = None) -> None:
        """Nothing: they are read by and by."""

    def settle(self) -> bool:
        """Nothing to wait for: there is no copy, and nobody else has what is read."""
        return True

    def end_downloads(self) -> None:
        """Nothing: they end when they have been made."""

    def release(self) -> None:
        """Let go of the source."""
        self._stream.close()

    def _finish(self) -> None:
        """End the last tensor."""
        self._stream.end()
        self._stream = Stream(self._source, -1)


class Stream:
    """A tensor's bytes from its first on, in whatever portions they are wanted."""

    def __init__(self, source: Source, position: int) -> None:
        self._label = source.outline.specs[position].label if position >= 0 else ""
        self._parts: Iterator[memoryview] = iter(source.read(position) if position >= 0 else ())
        self._rest: Bytes = np.empty(0, np.uint8)

    def fill(self, room: Bytes) -> None:
        """The next bytes."""
        at = 0
        while at < room.size:
            if not self._rest.size:
                part = next(self._parts, None)
                if part is None:
                    raise CorruptError(self._label, f"{room.size - at} bytes of it are missing")
                self._rest = np.frombuffer(part, np.uint8)
            count = min(room.size - at, self._rest.size)
            room[at : at + count] = self._rest[:count]
            self._rest, at = self._rest[count:], at + count

    def end(self) -> None:
        """See that nothing is left."""
        if self._rest.size or any(part.nbytes for part in self._parts):
            raise CorruptError(self._label, "it has more bytes than its type and shape say")

    def close(self) -> None:
        """Read no more."""
        if hasattr(self._parts, "close"):
            self._parts.close()


def _strides(spec: Spec) -> tuple[int, ...]:
    """Of the bytes as they come: in C order."""
    step, found = to_numpy(spec.dtype).itemsize, []
    for extent in reversed(spec.shape):
        found.append(step)
        step *= extent
    return tuple(reversed(found))
