"""What a restore has put into host memory already, so that copies of it needn't read it again."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from gpuckpt.arrays import Tensor
from gpuckpt.rounding import MASTER, round_to
from gpuckpt.spec import ChunkEntry, Extent

Bytes = npt.NDArray[np.uint8]


class Filled:
    """Chunks of float32 that are in host memory, one after the other, and have been checked.

    For several threads.  Refers to the targets, which nobody else changes meanwhile.
    """

    def __init__(self, masters: Collection[Extent]) -> None:
        """`masters` says where the chunks lie that are worth a note."""
        self.masters = masters
        self._places: dict[Extent, tuple[str, Bytes]] = {}
        self._lock = threading.Lock()

    def add(self, targets: Sequence[Tensor], start: int, chunk: ChunkEntry) -> None:
        """Take note of a chunk that each of these tensors holds now, from byte `start` on."""
        for target in targets:
            spec = target.spec
            if (spec.dtype, spec.device) == (MASTER, "cpu") and target.contiguous:
                flat = target.array.reshape(-1).view(np.uint8)
                place = flat[start : start + chunk.nbytes]
                with self._lock:
                    self._places[chunk.extent] = (chunk.fingerprint, place)
                return

    def round(self, dtype: str, chunk: ChunkEntry, out: Bytes) -> bool:
        """Make a derived chunk of what is there; False if it isn't one, or not all is there."""
        with self._lock:
            found = [self._places.get(source.extent) for source in chunk.sources]
        ready = [
            place
            for place, source in zip(found, chunk.sources, strict=True)
            if place is not None and place[0] == source.fingerprint
        ]
        if not ready or len(ready) < len(found):
            return False
        at = 0
        for _, raw in ready:
            round_to(dtype, raw, out[at : at + raw.size // 2])
            at += raw.size // 2
        return True
