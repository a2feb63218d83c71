"""What the save before wrote, kept on the host, so that the next can take differences from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from gpuckpt.fingerprint import fingerprint
from gpuckpt.plan import BASED_NBYTES, Plan, aligned
from gpuckpt.planes import join
from gpuckpt.spec import Chunk

log = logging.getLogger("gpuckpt")

Bytes = npt.NDArray[np.uint8]

FEWEST_NBYTES = BASED_NBYTES


class Bases:
    """The raw bytes of chunks as they were last put here, each with its fingerprint.

    `put` and `get` are for several threads, but not two of them with one chunk.
    """

    def __init__(self) -> None:
        self._plans: tuple[Plan, ...] = ()
        self._places: dict[Chunk, int] = {}
        self._memory: Bytes = np.empty(0, np.uint8)
        self._fingerprints: dict[Chunk, str] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that are kept."""
        return self._memory.size

    def prepare(self, plans: Mapping[str, Plan], room_nbytes: int) -> None:
        """Have room for the chunks of these plans, or for none if that takes too much.

        What is there stays while the plans are the same.  `room_nbytes` is
        beside what is kept now.
        """
        now = tuple(plans.values())
        if now == self._plans:
            return
        places, nbytes = _lay_out(now)
        room_nbytes += self.nbytes
        self._plans, self._places, self._fingerprints = (), {}, {}
        self._memory = np.empty(0, np.uint8)  # the old goes before the new comes
        if nbytes <= room_nbytes:
            self._places, self._memory = places, np.empty(nbytes, np.uint8)
        else:
            log.warning(
                "no deltas: they need %d bytes of the state before on the host, and memory= "
                "leaves %d; raise memory",
                *(nbytes, room_nbytes),
            )
        self._plans = now  # last, so that a call that was cut short is made up for

    def get(self, chunk: Chunk, known: str) -> Bytes | None:
        """A chunk's bytes as they were put here, if their fingerprint is `known`."""
        if self._fingerprints.get(chunk) != known:
            return None
        return self._room(chunk)

    def lacks(self, chunk: Chunk, known: str) -> bool:
        """Whether there is room for a chunk, and something else in it than what is `known`."""
        return chunk in self._places and self._fingerprints.get(chunk) != known

    def put(
        self, chunk: Chunk, planes: Sequence[Bytes], known: str, *, turned: bool = False
    ) -> None:
        """Keep a chunk, given as it is or by its planes, unless it isn't what is `known`.

        `turned` says whether planes are of elements that are.
        """
        if not self.lacks(chunk, known):
            return
        room = self._room(chunk)
        self._fingerprints.pop(chunk, None)
        if len(planes) == 1:
            np.copyto(room, planes[0])
        else:
            join(planes, room, turned=turned)
        if fingerprint(room.data) == known:  # else somebody changes it meanwhile
            self._fingerprints[chunk] = known

    def _room(self, chunk: Chunk) -> Bytes:
        place = self._places[chunk]
        return self._memory[place : place + chunk.nbytes]


def _lay_out(plans: Sequence[Plan]) -> tuple[dict[Chunk, int], int]:
    """Where each chunk that is worth it is kept, and what all of them take."""
    places, offset = {}, 0
    for chunk in (chunk for plan in plans for batch in plan.batches for chunk in batch):
        if chunk.nbytes >= FEWEST_NBYTES:
            places[chunk] = offset
            offset += aligned(chunk.nbytes)
    return places, offset
