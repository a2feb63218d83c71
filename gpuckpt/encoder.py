"""What a worker of a save does with a batch of chunks: look what is new in it, and encode that."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpuckpt.arena import Arena, Slot
from gpuckpt.bases import FEWEST_NBYTES, Bases
from gpuckpt.coding import Choice, encode
from gpuckpt.deltacoding import delta_pays, encode_delta, encode_folded, histograms_pay
from gpuckpt.devices import Arrived, Histograms
from gpuckpt.errors import TornError
from gpuckpt.fingerprint import checksum, fingerprint
from gpuckpt.increments import Before, is_short
from gpuckpt.planes import join
from gpuckpt.rows import CodedChunk, Fresh
from gpuckpt.spans import Lap
from gpuckpt.spec import Chunk, ChunkEntry, Spec
from gpuckpt.staging import Reread, Staged
from gpuckpt.statistics import Statistics, statistics_of

Bytes = npt.NDArray[np.uint8]
_Known = tuple[str, Statistics | None]


@dataclass(frozen=True, slots=True)
class Coded:
    """Chunks ready to be written, and what that took."""

    staged: Staged
    chunks: tuple[CodedChunk, ...]
    lap: Lap
    brought_nbytes: int


@dataclass(frozen=True, slots=True)
class Again:
    """Fingerprints of chunks that were read a second time."""

    staged: Reread
    fingerprints: Sequence[str]
    lap: Lap


class Encoder:
    """Encodes batches, in several threads at once."""

    def __init__(
        self,
        choose: Choice,
        before: Before,
        bases: Bases | None,
        arena: Arena,
        arrived: Callable[[], None],
    ) -> None:
        """`bases` are kept up to date; `arrived` is called for each batch on the host."""
        self._choose, self._before, self._bases = choose, before, bases
        self._arena, self._arrived = arena, arrived

    def wants(self, chunk: Chunk, fingerprint: str) -> bool:
        """Whether a chunk's bytes are needed: if it isn't on the disk, or its base must be kept."""
        if self._before.same(chunk, fingerprint) is None:
            return True
        return self._bases is not None and self._bases.lacks(chunk, fingerprint)

    def base(self, chunk: Chunk) -> str | None:
        """The fingerprint of the chunk before, from which a device may take a difference."""
        before = self._before.base(chunk)
        if before is None or self._bases is None or chunk.nbytes < FEWEST_NBYTES:
            return None
        return before.fingerprint

    def pays(self, chunk: Chunk, histograms: Histograms) -> bool:
        """Whether a chunk's difference takes clearly less, and leaves its chain quick to read."""
        before, (pays, share) = self._before.base(chunk), histograms_pay(histograms)
        return before is not None and pays and is_short(before, share)

    def work(self, batch: Staged | Reread) -> Coded | Again:
        """Wait for a batch, and encode it, or take note of what it was when it was read again."""
        lap = Lap()
        if isinstance(batch, Reread):
            again = Again(batch, batch.transfer.wait(), lap)
            lap.mark("reread")
            self._arrived()
            return again
        arrived = batch.transfer.wait()
        nbytes = sum(chunk.nbytes for chunk in batch.chunks)
        brought = sum(one.nbytes for one in arrived)
        lap.mark("copy", brought)
        self._arrived()
        specs = [batch.plan.specs[chunk.tensor] for chunk in batch.chunks]
        known = list(map(_known, arrived, specs))
        lap.mark("filter", 0 if arrived[0].fingerprint else nbytes)
        each = list(zip(batch.chunks, arrived, specs, batch.parts, known, strict=True))
        # Differences first: they lie where other chunks may be joined.
        order = sorted(range(len(each)), key=lambda at: not arrived[at].delta)
        coded = {at: self._one(*each[at]) for at in order}
        chunks = tuple(coded[at] for at in range(len(each)))
        lap.mark("encode", nbytes)
        return Coded(batch, chunks, lap, brought if arrived[0].fingerprint else 0)

    def _one(
        self, chunk: Chunk, arrived: Arrived, spec: Spec, part: Slot, known: _Known
    ) -> CodedChunk:
        print_, statistics = known
        coded: Fresh | ChunkEntry | None = self._before.same(chunk, print_)
        if coded is None and arrived.delta:
            encoded = encode_folded(arrived.delta, part)
            coded = Fresh(encoded, checksum(encoded.parts), self._before.base(chunk))
        elif coded is None:
            if not arrived.planes:
                raise TornError(spec.name)  # when it was looked at, it was the one before
            coded = self._coded(chunk, arrived.planes, spec.width, part)
        if arrived.planes and self._bases is not None:
            self._bases.put(chunk, arrived.planes, print_)
        return CodedChunk(chunk, print_, statistics, coded)

    def _coded(self, chunk: Chunk, planes: Sequence[Bytes], width: int, part: Slot) -> Fresh:
        """The chunk encoded."""
        delta = self._delta(chunk, planes, width, part)
        if delta is not None:
            return delta
        encoded = encode(planes, width, part, self._choose)
        return Fresh(encoded, checksum(encoded.parts))

    def _delta(self, chunk: Chunk, planes: Sequence[Bytes], width: int, part: Slot) -> Fresh | None:
        """What the chunk differs by from the one before; None if that isn't at hand or no gain."""
        before = self._before.base(chunk)
        if before is None or self._bases is None:
            return None
        base = self._bases.get(chunk, before.fingerprint)
        if base is None:
            return None
        with self._arena.spare() as spare:
            raw = planes[0]
            if len(planes) > 1:
                raw = spare.coded[: chunk.nbytes]
                join(planes, raw)
            pays, share = delta_pays(raw, base, width)
            if not pays or not is_short(before, share):
                return None
            encoded = encode_delta(raw, base, width, part, spare)
        return Fresh(encoded, checksum(encoded.parts), before)


def _known(arrived: Arrived, spec: Spec) -> _Known:
    """The fingerprint and the statistics of a chunk, from its device or taken here."""
    if arrived.fingerprint is not None:
        return arrived.fingerprint, arrived.statistics
    (raw,) = arrived.planes
    return fingerprint(raw.data), statistics_of(raw, spec.dtype)


def countdown(count: int, finish: Callable[[], None]) -> Callable[[], None]:
    """Call `finish` once the returned function was called `count` times, by any threads."""
    lock, left = threading.Lock(), count

    def fewer() -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if last:
            finish()

    return fewer
