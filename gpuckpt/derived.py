"""Tensors that are others rounded: of a mixed-precision state's copies only that fact is stored.

A float32 tensor (the master) and a bfloat16 or float16 one (the copy) are
paired by a sample of both, or because they were a pair in the checkpoint
before.  A worker that has a chunk of a master rounds it, and keeps the digests
of the leaves; a chunk of a copy is derived if its fingerprint is the root of
these (where masters' chunks end within a leaf, it never is).  So both needn't
be in memory at once, wherever they live, and the proof is the same 128 bits by
which unchanged chunks are known.

A plan has masters before their copies (`plan.plan_chunks`), and a batch with a
copy in it waits for batches before it only: they have been begun by then, by
threads that wait for nobody, so that it can't wait for ever.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from gpuckpt.arena import Arena, Slot
from gpuckpt.cutting import longest_chunk
from gpuckpt.devices import Frozen
from gpuckpt.dtypes import is_turned
from gpuckpt.fingerprint import leaf_digests, root
from gpuckpt.manifest import Manifest
from gpuckpt.plan import Plan, could_be_rounded
from gpuckpt.planes import join
from gpuckpt.rounding import MASTER, round_to
from gpuckpt.spec import Chunk, Extent, Spec
from gpuckpt.tensors import TensorEntry

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")
R = TypeVar("R")

# Elements that are compared before any others: an optimizer's moments differ in the first.
SAMPLE = 64
_ITEM, _NARROW_ITEM = 4, 2


@dataclass(frozen=True, slots=True)
class Derived:
    """What a chunk is instead of bytes of its own: a tensor's bytes from `start` on, rounded."""

    master: int
    start: int
    nbytes: int


class Derivation:
    """The pairs of one save, and the digests of what its masters were rounded to."""

    def __init__(self, masters: Mapping[int, int], plans: Iterable[Plan]) -> None:
        """`masters` has the position of each copy's master, which is on the same device."""
        self._masters = masters
        self._kinds: dict[int, set[str]] = {}
        self._chunks: dict[int, list[Chunk]] = {}
        for plan in plans if masters else ():
            for copy, master in masters.items():
                if copy in plan.copies:
                    self._kinds.setdefault(master, set()).add(plan.specs[copy].dtype)
            for chunk in (chunk for batch in plan.batches for chunk in batch):
                if chunk.tensor in self._kinds:
                    self._chunks.setdefault(chunk.tensor, []).append(chunk)
        # None: the chunk wasn't brought.
        self._digests: dict[tuple[Chunk, str], bytes | None] = {}
        self._changed, self._ended = threading.Condition(), False

    def is_master(self, chunk: Chunk) -> bool:
        """Whether the chunk is a master's, which `take` rounds."""
        return chunk.tensor in self._kinds

    def take(self, chunk: Chunk, planes: Sequence[Bytes], arena: Arena) -> None:
        """If the chunk is a master's, round it, and let those who wait for it go on.

        Without `planes` it wasn't brought, and nothing is derived from it.
        """
        for dtype in self._kinds.get(chunk.tensor, ()):
            digests = _rounded_digests(chunk, planes, dtype, arena) if planes else None
            with self._changed:
                self._digests[chunk, dtype] = digests
                self._changed.notify_all()

    def sources(self, chunk: Chunk) -> Sequence[Chunk]:
        """The master's chunks from which a copy's may be derived; none of any other chunk."""
        master = self._masters.get(chunk.tensor)
        if master is None:
            return ()
        chunks, start, nbytes = self._chunks[master], 2 * chunk.start, 2 * chunk.nbytes
        longest, end = chunks[0].nbytes, start + nbytes  # as are all but the last
        found = chunks[start // longest : -(-end // longest)]
        whole = start == found[0].start and end == found[-1].start + found[-1].nbytes
        return found if whole else ()

    def find(self, chunk: Chunk, spec: Spec, fingerprint: str) -> Derived | None:
        """What the chunk is derived from, if it is; waits for its master's chunks."""
        sources = self.sources(chunk)
        if not sources:
            return None
        keys = [(source, spec.dtype) for source in sources]
        with self._changed:
            self._changed.wait_for(lambda: self._ended or all(key in self._digests for key in keys))
            if self._ended:
                return None
            digests = [self._digests[key] for key in keys]
        known = [one for one in digests if one is not None]
        if len(known) < len(digests):
            return None
        if root(b"".join(known), chunk.nbytes) != fingerprint:
            return None
        return Derived(sources[0].tensor, 2 * chunk.start, 2 * chunk.nbytes)

    def guarded(self, work: Callable[[T], R]) -> Callable[[T], R]:
        """The same, but if it fails, nobody waits any more for what it would have taken."""

        def guarded(item: T) -> R:
            try:
                return work(item)
            except BaseException:
                self.end()
                raise

        return guarded

    @contextlib.contextmanager
    def ended(self) -> Iterator[None]:
        """`end` it at the end."""
        try:
            yield
        finally:
            self.end()

    def end(self) -> None:
        """Let all who wait go on, with nothing: some chunks may never come."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def _rounded_digests(chunk: Chunk, planes: Sequence[Bytes], dtype: str, arena: Arena) -> bytes:
    """The digests of the leaves of a master's chunk, rounded."""
    with arena.spare() as spare:
        raw = planes[0]
        if len(planes) > 1:
            raw = spare.raw[: chunk.nbytes]
            join(planes, raw, turned=is_turned(MASTER))
        narrow = spare.planes[: chunk.nbytes * _NARROW_ITEM // _ITEM]
        round_to(dtype, raw, narrow)
        return leaf_digests(narrow.data)


def pair(
    plans: Mapping[str, Plan],
    frozen: Mapping[str, Frozen],
    previous: Manifest | None,
    arena: Arena,
) -> Derivation:
    """The copies of a frozen state, and their masters, as far as a sample can tell.

    What was a pair in `previous` is looked for at once, all others by the
    sample: of the middle of the masters' first chunks, which may be read from
    the device and waited for.  A sample that is the same throughout pairs nothing.
    """
    masters: dict[int, int] = {}
    for name, plan in plans.items():
        if plan.copies:
            known = _known(plan, previous)
            masters |= known
            left = [at for at in plan.copies if at not in known]
            masters |= _sampled(plan, left, frozen[name], arena)
    return Derivation(masters, plans.values())


def _known(plan: Plan, previous: Manifest | None) -> dict[int, int]:
    """The pairs of the checkpoint before, whose tensors are here under the same labels."""
    if previous is None:
        return {}
    labels = {
        entry.chunks[0].extent: entry.spec.label
        for entry in previous.tensors
        if entry.spec.dtype == MASTER and entry.chunks
    }
    here = {plan.specs[at].label: at for at in plan.tensors}
    found = {}
    for copy, source in _derived_before(previous.tensors):
        at, master = here.get(copy, -1), here.get(labels.get(source, ""), -1)
        if at in plan.copies and master >= 0 and could_be_rounded(plan.specs, at, master):
            found[at] = master
    return found


def _derived_before(tensors: Iterable[TensorEntry]) -> Iterator[tuple[str, Extent]]:
    """The label of each tensor of which the first chunk was derived, and where from."""
    for entry in tensors:
        if entry.chunks and entry.chunks[0].sources:
            yield entry.spec.label, entry.chunks[0].sources[0].extent


def _sampled(plan: Plan, copies: Sequence[int], frozen: Frozen, arena: Arena) -> dict[int, int]:
    """Pairs of which a sample of the copy is that of the master, rounded."""
    slot = arena.take()
    try:
        given = zip(copies, _samples(plan, copies, frozen, slot), strict=True)
        wanted = {at: sample for at, sample in given if not _is_constant(sample, _NARROW_ITEM)}
        if not wanted:
            return {}
        keys = {(_count(plan.specs[at]), plan.specs[at].dtype, wanted[at]) for at in wanted}
        counts = {count for count, _, _ in keys}
        wide = [
            at
            for at in plan.tensors
            if plan.specs[at].dtype == MASTER and _count(plan.specs[at]) in counts
        ]
        samples = _samples(plan, wide, frozen, slot)
    finally:
        arena.give(slot)
    masters: dict[tuple[int, str, bytes], int] = {}
    for dtype in {dtype for _, dtype, _ in keys}:
        for at, sample in zip(wide, _rounded(samples, dtype), strict=True):
            masters.setdefault((_count(plan.specs[at]), dtype, sample), at)
    found = {
        at: masters.get((_count(plan.specs[at]), plan.specs[at].dtype, sample))
        for at, sample in wanted.items()
    }
    return {at: master for at, master in found.items() if master is not None}


def _samples(plan: Plan, tensors: Sequence[int], frozen: Frozen, slot: Slot) -> list[bytes]:
    """Bytes of some elements of each tensor: the same elements, whatever their type."""
    chunks = []
    for at in tensors:
        spec = plan.specs[at]
        most = longest_chunk(replace(spec, dtype=MASTER), plan.chunk_nbytes) // _ITEM
        item = spec.nbytes // _count(spec)
        count = min(_count(spec), most)
        start = max(count - SAMPLE, 0) // 2
        chunks.append(Chunk(at, start * item, min(count, SAMPLE) * item))
    return frozen.peek(chunks, slot)


def _count(spec: Spec) -> int:
    return spec.nbytes // (_ITEM if spec.dtype == MASTER else _NARROW_ITEM)


def _rounded(samples: Sequence[bytes], dtype: str) -> Iterator[bytes]:
    """All of them at once: a call for each would take longer than all else."""
    whole = np.frombuffer(b"".join(samples), np.uint8)
    narrow = np.empty(whole.size * _NARROW_ITEM // _ITEM, np.uint8)
    round_to(dtype, whole, narrow)
    at = 0
    for sample in samples:
        end = at + len(sample) * _NARROW_ITEM // _ITEM
        yield narrow[at:end].tobytes()
        at = end


def _is_constant(sample: bytes, item: int) -> bool:
    return sample == sample[:item] * (len(sample) // item)
