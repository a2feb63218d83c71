"""Pure arithmetic: which bytes of which tensor make up which chunk, which chunks share a slot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gpuckpt.cutting import longest_chunk
from gpuckpt.dtypes import to_numpy
from gpuckpt.layout import LEAF_NBYTES
from gpuckpt.rounding import MASTER, NARROW
from gpuckpt.spec import Chunk, Spec

ALIGNMENT = 64
# What a device that splits chunks itself adds to them in a slot: a plane's padding, a
# summary of each leaf, and the row of its table that says how a strided tensor lies in memory.
PLANE_ALIGNMENT = 16
SUMMARY_NBYTES = 80
RUN_NBYTES = 640
# A smaller chunk's row in a manifest would grow by more than a difference from its base saves.
BASED_NBYTES = 64 << 10
_WIDTH_MAX = 8
_DIGEST_NBYTES = 16
# To look at a smaller copy takes as long as to save it; all of them are little of a model.
_FEWEST_NBYTES = 8 << 10

T = TypeVar("T")
Strides = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """How one device's tensors are cut into chunks; worth keeping, and compared by identity.

    `specs` and `strides` (bytes) are those of the whole state, in which
    `tensors` and the chunks' `tensor` are positions.  The chunks of one of
    `batches` share a slot on their way to the host; those of one of `rereads`
    are looked at together when it is to be seen whether they have changed.
    `strided` are the tensors whose bytes don't lie one after the other,
    `copies` those that could be others rounded: they come after all others.
    """

    device: str
    specs: Sequence[Spec]
    strides: Sequence[Strides]
    tensors: tuple[int, ...]
    batches: tuple[tuple[Chunk, ...], ...]
    rereads: tuple[tuple[Chunk, ...], ...]
    strided: frozenset[int]
    split: bool
    chunk_nbytes: int
    copies: frozenset[int] = frozenset()

    def width(self, chunk: Chunk) -> int:
        """Planes that a device which splits chunks splits this one into."""
        return self.specs[chunk.tensor].width if self.split else 1

    def turned(self, chunk: Chunk) -> bool:
        """Whether these planes are of elements that are turned."""
        return self.split and self.specs[chunk.tensor].turned


def make_plans(
    specs: Sequence[Spec],
    strides: Sequence[Strides],
    by_device: Mapping[str, Sequence[int]],
    *,
    chunk_nbytes: int,
    split: bool,
) -> dict[str, Plan]:
    """A plan for each device; `split` says whether planes are wanted at all."""
    plans = {}
    area = area_nbytes(chunk_nbytes)
    for device, tensors in by_device.items():
        copies = _possible_copies(specs, tensors)
        order = sorted(tensors, key=copies.__contains__)
        chunks = list(plan_chunks(specs, order, chunk_nbytes=chunk_nbytes))
        strided = frozenset(at for at in tensors if not is_dense(specs[at], strides[at]))

        def staged(chunk: Chunk, strided: frozenset[int] = strided) -> int:
            return staged_nbytes(chunk.nbytes, specs[chunk.tensor].width, chunk.tensor in strided)

        def reread(chunk: Chunk, strided: frozenset[int] = strided) -> int:
            return _reread_nbytes(chunk.nbytes, chunk.tensor in strided)

        batches = tuple(batch_chunks(chunks, staged, batch_nbytes=area))
        host = device == "cpu"  # where a worker reads them again, no more than it read at a time
        rereads = batches if host else tuple(batch_chunks(chunks, reread, batch_nbytes=area))
        plans[device] = Plan(
            *(device, specs, strides, tuple(tensors), batches, rereads, strided, split),
            chunk_nbytes=max((chunk_nbytes, *(chunk.nbytes for chunk in chunks))),
            copies=copies,
        )
    return plans


def plan_chunks(
    specs: Sequence[Spec], tensors: Iterable[int] | None = None, *, chunk_nbytes: int
) -> Iterator[Chunk]:
    """Cut tensors (all, or those at some positions) into chunks of at most `chunk_nbytes`.

    Shards' are smaller (`cutting`).
    No element is cut in two; a tensor without bytes has no chunks.
    """
    for tensor in range(len(specs)) if tensors is None else tensors:
        spec = specs[tensor]
        if spec.nbytes:
            itemsize = to_numpy(spec.dtype).itemsize
            longest = max(longest_chunk(spec, chunk_nbytes) // itemsize, 1) * itemsize
            for start in range(0, spec.nbytes, longest):
                yield Chunk(tensor, start, min(longest, spec.nbytes - start))


def batch_chunks(
    chunks: Iterable[T],
    cost: Callable[[T], int],
    *,
    batch_nbytes: int,
    most: int = 1 << 20,
) -> Iterator[tuple[T, ...]]:
    """Put chunks that follow each other together while their costs fit `batch_nbytes`.

    At most `most` of them.  Thousands of small tensors then cost a few rounds
    through the stages, not thousands.  One chunk that is larger makes a batch
    of its own.
    """
    batch: list[T] = []
    room = batch_nbytes
    for chunk in chunks:
        nbytes = cost(chunk)
        if batch and (nbytes > room or len(batch) == most):
            yield tuple(batch)
            batch, room = [], batch_nbytes
        batch.append(chunk)
        room -= nbytes
    if batch:
        yield tuple(batch)


def largest_nbytes(plans: Mapping[str, Plan]) -> int:
    """Bytes of the largest chunk of some plans."""
    return max((plan.chunk_nbytes for plan in plans.values()), default=0)


def area_nbytes(chunk_nbytes: int) -> int:
    """Room for any chunk of at most so many bytes, with all that comes with it."""
    return staged_nbytes(chunk_nbytes, 1, strided=True) + _WIDTH_MAX * PLANE_ALIGNMENT


def staged_nbytes(nbytes: int, width: int, strided: bool) -> int:  # noqa: FBT001
    """Room that a chunk takes in a slot: its planes, and what a device says of it."""
    planes = width * _up(nbytes // width, PLANE_ALIGNMENT)
    return aligned(planes + _leaves(nbytes) * SUMMARY_NBYTES + strided * RUN_NBYTES)


def target_nbytes(nbytes: int) -> int:
    """Room that each place takes to which a chunk is restored: its rows, and leaves' digests."""
    return aligned(SUMMARY_NBYTES) + aligned(RUN_NBYTES) + aligned(_leaves(nbytes) * _DIGEST_NBYTES)


def aligned(nbytes: int) -> int:
    """`nbytes`, rounded up so that what follows begins on a cache line."""
    return _up(nbytes, ALIGNMENT)


def is_dense(spec: Spec, strides: Strides) -> bool:
    """Whether a tensor's bytes lie one after the other, in C order."""
    step = to_numpy(spec.dtype).itemsize
    for extent, stride in zip(reversed(spec.shape), reversed(strides), strict=True):
        if extent > 1 and stride != step:
            return not spec.nbytes
        step *= extent
    return True


def could_be_rounded(specs: Sequence[Spec], copy: int, master: int) -> bool:
    """Whether a tensor's type and number of elements are those of another one, rounded."""
    one, other = specs[copy], specs[master]
    return one.dtype in NARROW and other.dtype == MASTER and other.nbytes == 2 * one.nbytes


def _possible_copies(specs: Sequence[Spec], tensors: Sequence[int]) -> frozenset[int]:
    """Those tensors which some other one on the device could be the master of."""
    wide = {specs[at].nbytes for at in tensors if specs[at].dtype == MASTER}
    narrow = (at for at in tensors if specs[at].dtype in NARROW)
    return frozenset(
        at for at in narrow if specs[at].nbytes >= _FEWEST_NBYTES and 2 * specs[at].nbytes in wide
    )


def _reread_nbytes(nbytes: int, strided: bool) -> int:  # noqa: FBT001
    row = SUMMARY_NBYTES + _leaves(nbytes) * _DIGEST_NBYTES
    return aligned(row + strided * (nbytes + PLANE_ALIGNMENT + RUN_NBYTES))


def _leaves(nbytes: int) -> int:
    return -(-nbytes // LEAF_NBYTES)


def _up(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit
