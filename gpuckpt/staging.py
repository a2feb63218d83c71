"""Stage a snapshot's chunks into host memory, and upload chunks from it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gpuckpt.arena import Arena, Slot
from gpuckpt.devices import Arrived, Device, Piece, Transfer, Upload, Wants
from gpuckpt.inventory import Snapshot
from gpuckpt.ordered import alternated
from gpuckpt.plan import Plan, aligned
from gpuckpt.spec import Chunk

log = logging.getLogger("gpuckpt")


@dataclass(frozen=True, slots=True)
class Staged:
    """Chunks on their way to a slot: wait for `transfer`, and `give` the slot back after it."""

    plan: Plan
    chunks: tuple[Chunk, ...]
    slot: Slot
    transfer: Transfer[Sequence[Arrived]]

    @property
    def parts(self) -> Iterator[Slot]:
        """Each chunk's own part of the slot."""
        offset = 0
        for chunk in self.chunks:
            yield self.slot.part(offset, chunk.nbytes)
            offset += aligned(chunk.nbytes)


@dataclass(frozen=True, slots=True)
class Reread:
    """Fingerprints, taken once more, of chunks whose memory may have changed meanwhile."""

    chunks: tuple[Chunk, ...]
    slot: Slot
    transfer: Transfer[Sequence[str]]


def stage(
    snapshot: Snapshot, arena: Arena, wants: Wants | None = None
) -> Iterator[Staged | Reread]:
    """Begin to bring each batch of a snapshot's chunks to a slot of the arena, or what is wanted.

    Each device's in order, the devices in turn.  After them, what was read
    where the caller has it is looked at again.  Waits for a free slot and, of
    each GPU, first for what it says of the chunks; once all slots are in use,
    for copies and for all that comes at once: then the state is the caller's.
    """
    try:
        snapshot.bring(wants)
        yield from alternated(
            _stage(name, snapshot, arena, wants) for name in tuple(snapshot.frozen)
        )
    finally:
        snapshot.end_downloads()


def _stage(
    name: str, snapshot: Snapshot, arena: Arena, wants: Wants | None
) -> Iterator[Staged | Reread]:
    """One device's share."""
    frozen, plan = snapshot.frozen[name], snapshot.plans[name]
    for at, chunks in enumerate(plan.batches):
        slot = _slot(snapshot, arena)
        with _given_back(slot, arena):
            transfer = frozen.download(at, slot, wants)
        yield Staged(plan, chunks, slot, transfer)
    snapshot.settle()
    for at, chunks in enumerate(plan.rereads if frozen.live else ()):
        slot = _slot(snapshot, arena)
        with _given_back(slot, arena):
            again = frozen.reread(at, slot)
        yield Reread(chunks, slot, again)


def _slot(snapshot: Snapshot, arena: Arena) -> Slot:
    """A slot; before it is waited for, for how long nobody knows, the state goes back if it can."""
    if arena.is_used_up:
        snapshot.settle()
    return arena.take()


def give_back(staged: Staged | Reread, arena: Arena) -> None:
    """Give the slot of chunks that nobody wants back, once nothing can arrive in it any more."""
    try:
        staged.transfer.wait()
    except BaseException as error:
        log.debug("chunks were dropped: %s", error)  # why they were is raised elsewhere
    finally:
        arena.give(staged.slot)


def upload(pieces: Sequence[Piece], device: Device, slot: Slot) -> Upload:
    """Make ready to bring chunks to their places, by way of a slot: undoes `stage`."""
    return device.upload(pieces, slot)


@contextlib.contextmanager
def _given_back(slot: Slot, arena: Arena) -> Iterator[None]:
    """If nothing can be begun, nobody else gives the slot back."""
    try:
        yield
    except BaseException:
        arena.give(slot)
        raise
