"""What a worker of a save does with a batch of chunks: look what is new in it, and encode that."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap

import numpy as np
import numpy.typing as npt

from gpuckpt.arena import Arena, Slot
from gpuckpt.bases import FEWEST_NBYTES, Bases
from gpuckpt.coding import Choice, Encoded, Samples, choose_planes, encode, encode_chosen
from gpuckpt.cutting import tiles_of
from gpuckpt.deltacoding import delta_pays, encode_delta, encode_folded, histograms_pay
from gpuckpt.derived import Derivation, Derived
from gpuckpt.devices import Arrived, Histograms
from gpuckpt.errors import TornError
from gpuckpt.fingerprint import checksum, fingerprint
from gpuckpt.increments import Before, is_short
from gpuckpt.look import Look, look
from gpuckpt.planes import join, split
from gpuckpt.rows import CodedChunk, Fresh
from gpuckpt.spans import Lap
from gpuckpt.spec import Chunk, ChunkEntry, Ends, Spec
from gpuckpt.staging import Reread, Staged
from gpuckpt.tilecoding import encode_tiles

log = logging.getLogger("gpuckpt")

Bytes = npt.NDArray[np.uint8]
# What was seen of a chunk, and the planes to try, where that is chosen already.
_Known = tuple[Look, Sequence[bool] | None]


@dataclass(frozen=True, slots=True)
class Coded:
    """Chunks ready to be written, and what that took."""

    staged: Staged
    chunks: tuple[CodedChunk, ...]
    lap: Lap
    brought_nbytes: int

    @property
    def nbytes(self) -> int:
        """Bytes in memory of those that are to be written."""
        return sum(one.chunk.nbytes for one in self.chunks if isinstance(one.coded, Fresh))


@dataclass(frozen=True, slots=True)
class Again:
    """Fingerprints of chunks that were read a second time."""

    staged: Reread
    fingerprints: Sequence[str]
    lap: Lap


class Encoder:
    """Encodes batches, in several threads at once."""

    def __init__(  # noqa: PLR0917 - all that a worker has
        self,
        choose: Choice,
        before: Before,
        bases: Bases | None,
        derivation: Derivation,
        arena: Arena,
        arrived: Callable[[], None],
    ) -> None:
        """`bases` are kept up to date; `arrived` is called for each batch on the host."""
        self._choose, self._before, self._bases = choose, before, bases
        self._derivation, self._arena, self._arrived = derivation, arena, arrived

    def wanted(self, fingerprints: Mapping[Chunk, str]) -> frozenset[Chunk]:
        """The chunks whose bytes are needed: here, or to see what others are derived from."""
        wanted = {chunk for chunk, known in fingerprints.items() if self._wants(chunk, known)}
        for chunk in tuple(wanted):
            wanted.update(self._derivation.sources(chunk))
        return frozenset(wanted)

    def _wants(self, chunk: Chunk, fingerprint: str) -> bool:
        """Whether a chunk isn't on the disk, or its base must be kept."""
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

    def rounds(self, chunk: Chunk) -> bool:
        """Whether a chunk is rounded here, to see whether a copy is derived from it."""
        return self._derivation.is_master(chunk)

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
        each = list(zip(batch.chunks, arrived, specs, batch.parts, strict=True))
        known = list(starmap(self._known, each))
        lap.mark("filter", 0 if arrived[0].fingerprint else nbytes)
        # Before any copy's chunk waits for its master's.
        for chunk, one in zip(batch.chunks, arrived, strict=True):
            self._derivation.take(chunk, one.planes, self._arena)
        # Differences first: they lie where other chunks may be joined.
        order = sorted(range(len(each)), key=lambda at: not arrived[at].delta)
        coded = {at: self._one(*each[at], known[at]) for at in order}
        chunks = tuple(coded[at] for at in range(len(each)))
        lap.mark("encode", nbytes)
        return Coded(batch, chunks, lap, brought if arrived[0].fingerprint else 0)

    def _known(self, chunk: Chunk, arrived: Arrived, spec: Spec, part: Slot) -> _Known:
        """What there is to see of a chunk: its device has said it, or it is looked at here.

        While it is, it is split into the planes that are to be tried; not if
        it may become a delta, which is made of the chunk as it is.
        """
        if arrived.fingerprint is not None:
            return Look(arrived.fingerprint, arrived.statistics), None
        (raw,) = arrived.planes
        if self._bases is not None and self._before.base(chunk) is not None:
            return look(raw, spec.dtype), None
        tries = self._choose(Samples(raw, spec.width, turned=spec.turned), raw.size)
        room = part.planes if any(tries) else None
        return look(raw, spec.dtype, spec.width, room), tries

    def _one(
        self, chunk: Chunk, arrived: Arrived, spec: Spec, part: Slot, known: _Known
    ) -> CodedChunk:
        seen, _ = known
        coded: Fresh | ChunkEntry | Derived
        if arrived.delta or not arrived.planes:
            coded = self._decided(chunk, arrived, spec, part)
        else:
            coded = self._of_planes(chunk, arrived.planes, spec, part, known)
        return CodedChunk(chunk, seen.fingerprint, seen.statistics, coded)

    def _decided(
        self, chunk: Chunk, arrived: Arrived, spec: Spec, part: Slot
    ) -> Fresh | ChunkEntry:
        """The difference that a device took, or the entry of what is on the disk already."""
        if arrived.delta:
            encoded = encode_folded(arrived.delta, part)
            return Fresh(encoded, checksum(encoded.parts), self._before.base(chunk))
        assert arrived.fingerprint is not None, "only devices that say it leave planes behind"
        same = self._before.same(chunk, arrived.fingerprint)
        if same is None:
            raise TornError(spec.label)  # when it was looked at, it was the one before
        return same

    def _of_planes(
        self, chunk: Chunk, planes: Sequence[Bytes], spec: Spec, part: Slot, known: _Known
    ) -> Fresh | ChunkEntry | Derived:
        """What the chunk is derived from, its entry if it is on the disk already, or it encoded."""
        seen, _ = known
        derived = self._derivation.find(chunk, spec, seen.fingerprint)
        if derived is not None:
            return derived
        coded = self._before.same(chunk, seen.fingerprint) or self._coded(
            chunk, planes, spec, part, known
        )
        if self._bases is not None:
            self._bases.put(chunk, planes, seen.fingerprint, turned=spec.turned)
        return coded

    def _coded(
        self, chunk: Chunk, planes: Sequence[Bytes], spec: Spec, part: Slot, known: _Known
    ) -> Fresh:
        """The chunk encoded."""
        seen, tries = known
        delta = self._delta(chunk, planes, spec, part)
        if delta is not None:
            return delta
        tiles = tiles_of(spec, chunk)
        if tiles:
            encoded = self._in_tiles(tiles, planes, spec, part, known)
        elif tries is None:
            encoded = encode(planes, spec.width, part, self._choose, turned=spec.turned)
        else:
            split = seen.planes or planes
            encoded = encode_chosen(planes[0], split, tries, part, turned=spec.turned)
        as_it_is = not tiles and len(encoded.planes) == 1 and encoded.planes[0].codec == "raw"
        known_check = seen.checksum if as_it_is else None
        return Fresh(encoded, known_check or checksum(encoded.parts))

    def _in_tiles(
        self, tiles: Ends, planes: Sequence[Bytes], spec: Spec, part: Slot, known: _Known
    ) -> Encoded:
        """The chunk encoded in tiles."""
        seen, tries = known
        with self._arena.spare() as spare:
            turned = spec.turned and len(planes) > 1
            if tries is None:
                tries = choose_planes(planes, spec.width, self._choose, turned=spec.turned)
                if any(tries) and len(planes) < spec.width:
                    planes = split(planes[0], spec.width, part.planes, turned=spec.turned)
                    turned = spec.turned
            elif seen.planes is not None:
                planes, turned = seen.planes, spec.turned
            tries = tries if len(planes) == len(tries) else [False]
            return encode_tiles(
                planes, tries, tiles, (part, spare), seen.fingerprint, turned=turned
            )

    def _delta(self, chunk: Chunk, planes: Sequence[Bytes], spec: Spec, part: Slot) -> Fresh | None:
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
                join(planes, raw, turned=spec.turned)
            pays, share = delta_pays(raw, base, spec.width)
            if not pays or not is_short(before, share):
                return None
            if fingerprint(base.data) != before.fingerprint:
                log.warning("%s: the bytes kept of it have changed in memory", spec.label)
                return None
            encoded = encode_delta(raw, base, spec.width, part, spare)
        return Fresh(encoded, checksum(encoded.parts), before)


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
