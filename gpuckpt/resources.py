"""What a save or a restore may use: devices, host memory, threads."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping

from gpuckpt.arena import Arena, arena_nbytes
from gpuckpt.bases import Bases
from gpuckpt.devices import Devices
from gpuckpt.errors import InvalidError
from gpuckpt.layout import CHUNK_NBYTES, CHUNK_NBYTES_MAX
from gpuckpt.plan import Plan
from gpuckpt.sizes import parse_nbytes
from gpuckpt.snapshot import room_beside_copy

log = logging.getLogger("gpuckpt")

_WORKERS_MAX = 8


class Resources:
    """Devices, an arena within a budget, and a number of threads; kept from save to save."""

    def __init__(self, memory: int | str, *, chunk_nbytes: int = CHUNK_NBYTES) -> None:
        """`memory` bounds the host memory that gpuckpt takes, whatever the state's size.

        Raises:
            InvalidError: it isn't a size, or is too small to work with.
        """
        self.devices = Devices()
        self.bases = Bases()
        self.workers = min(len(os.sched_getaffinity(0)), _WORKERS_MAX)
        self.chunk_nbytes = chunk_nbytes
        if not 0 < chunk_nbytes <= CHUNK_NBYTES_MAX:
            raise InvalidError(f"a chunk has 1 to {CHUNK_NBYTES_MAX} bytes, got {chunk_nbytes}")
        self.budget_nbytes = parse_nbytes(memory)
        self._arena_nbytes = arena_nbytes(self.budget_nbytes, chunk_nbytes, self.workers)
        self.free_seconds = 0.0  # see `Balance`
        self._arena: Arena | None = None
        self._page_locked = False

    @property
    def host_room_nbytes(self) -> int:
        """What the budget leaves beside the arena and the bases."""
        return max(self.budget_nbytes - self._arena_nbytes - self.bases.nbytes, 0)

    def prepare_bases(self, plans: Mapping[str, Plan], mode: str) -> None:
        """Have room for the bytes of a state, for differences: on its devices, else on the host.

        `mode` is that of snapshots: on devices bases are copies.
        """
        room = room_beside_copy(plans, self.devices, mode, host_room_nbytes=self.host_room_nbytes)
        if mode != "hold":
            kept = {name for name, plan in plans.items() if self.devices[name].keep_bases(plan)}
            plans = {name: plan for name, plan in plans.items() if name not in kept}
        self.bases.prepare(plans, room)

    def arena(self, device_names: Iterable[str], largest_nbytes: int = 0) -> Arena:
        """The arena, taken at its first use: page-locked if a GPU is among the devices.

        Taken anew if a chunk of `largest_nbytes` wouldn't fit a slot, if it
        was taken before there was a GPU, or if a slot wasn't given back: call
        this when no save and no restore goes on.

        Raises:
            InvalidError: slots for such chunks don't fit the budget.
        """
        name = max(device_names, default="cpu")  # "cuda:…" sorts after "cpu"
        locked = self._page_locked or name != "cpu"
        arena = self._arena
        if arena is not None and arena.lacks_slots:
            log.warning("slots of host memory were lost to a failure; new ones are taken")
            arena = None
        if arena is None or arena.chunk_nbytes < largest_nbytes or locked > self._page_locked:
            self._arena, self._page_locked = None, locked  # the old one goes before the new comes
            slot_nbytes = max(self.chunk_nbytes, largest_nbytes)
            self._arena_nbytes = arena_nbytes(self.budget_nbytes, slot_nbytes, self.workers)
            if self._arena_nbytes + self.bases.nbytes > self.budget_nbytes:
                self.bases.prepare({}, 0)
            memory = self.devices[name].host_memory(self._arena_nbytes)
            arena = self._arena = Arena(memory, slot_nbytes)
        return arena
