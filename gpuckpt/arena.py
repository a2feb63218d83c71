"""Host memory for chunks on their way: taken once, in slots that go round."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import zstandard

from gpuckpt.errors import InvalidError
from gpuckpt.plan import area_nbytes

Bytes = npt.NDArray[np.uint8]

# MEASUREMENTS of ADR 0005: fast strategy with matching all but off, which leaves
# the Huffman stage: the order-0 entropy of a weight's exponent plane at twice
# the speed of level 1.
ZSTD = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    min_match=7,
    hash_log=6,
    window_log=17,
    chain_log=6,
    search_log=1,
    target_length=0,
    write_content_size=True,
    write_checksum=False,
)
AREAS = 3
# Of frames that are read: more would be memory that nobody counts.
WINDOW_NBYTES_MAX = 128 << 20
FEWEST_SLOTS = 2


@dataclass(slots=True)
class Slot:
    """Room for one chunk, or some small ones: as it is, split into planes, and encoded.

    It has a compressor and a decompressor of its own, which hold some state
    between calls and serve one thread at a time.
    """

    raw: Bytes
    planes: Bytes
    coded: Bytes
    compressor: zstandard.ZstdCompressor = field(
        default_factory=lambda: zstandard.ZstdCompressor(compression_params=ZSTD)
    )
    decompressor: zstandard.ZstdDecompressor = field(
        default_factory=lambda: zstandard.ZstdDecompressor(max_window_size=WINDOW_NBYTES_MAX)
    )

    def part(self, offset: int, nbytes: int) -> Slot:
        """Room for one chunk of several that share the slot, one after the other."""
        end = offset + nbytes
        raw, planes, coded = (area[offset:end] for area in (self.raw, self.planes, self.coded))
        return Slot(raw, planes, coded, self.compressor, self.decompressor)


class Arena:
    """A fixed number of slots over one piece of host memory."""

    def __init__(self, memory: Bytes, chunk_nbytes: int) -> None:
        """Cut `memory` into as many slots as fit; see `arena_nbytes`."""
        self.chunk_nbytes = chunk_nbytes
        self.area_nbytes = area_nbytes(chunk_nbytes)
        self.nbytes = memory.size
        count = memory.size // (AREAS * self.area_nbytes)
        areas = memory[: count * AREAS * self.area_nbytes].reshape(count, AREAS, -1)
        self._free = [Slot(*areas[at]) for at in range(count)]
        self.count = count
        self._changed = threading.Condition()
        self._spares: list[Slot] = []

    def take(self) -> Slot:
        """A free slot; waits for one.  `give` it back."""
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            return self._free.pop()

    def give(self, slot: Slot) -> None:
        """Make a slot free again."""
        with self._changed:
            self._free.append(slot)
            self._changed.notify()

    @property
    def is_used_up(self) -> bool:
        """Whether none is free."""
        return not self._free

    @property
    def lacks_slots(self) -> bool:
        """Whether some aren't free: while nobody works with it, a failure has cost them."""
        return len(self._free) < self.count

    @contextlib.contextmanager
    def spare(self) -> Iterator[Slot]:
        """A slot beside the others, for a moment's work with a chunk: never waits.

        Of ordinary memory, taken at its first use and kept: as many as are in
        use at the same time, which is one for each thread that works.
        """
        with self._changed:
            slot = self._spares.pop() if self._spares else None
        slot = slot or Slot(*np.empty((AREAS, self.area_nbytes), np.uint8))
        try:
            yield slot
        finally:
            with self._changed:
                self._spares.append(slot)


def arena_nbytes(budget_nbytes: int, chunk_nbytes: int, workers: int) -> int:
    """Bytes for as many slots as keep `workers` busy, within the budget.

    Raises:
        InvalidError: the budget is too small for the fewest slots.
    """
    slot_nbytes = AREAS * area_nbytes(chunk_nbytes)
    useful = 2 * workers + FEWEST_SLOTS
    count = min(useful, budget_nbytes // slot_nbytes)
    if count < FEWEST_SLOTS:
        raise InvalidError(
            f"memory: {budget_nbytes} bytes are too few; "
            f"the least is {FEWEST_SLOTS * slot_nbytes} bytes ({FEWEST_SLOTS} slots)"
        )
    return count * slot_nbytes
