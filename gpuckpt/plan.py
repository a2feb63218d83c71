"""Pure arithmetic: which bytes of which tensor make up which chunk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from gpuckpt.dtypes import to_numpy
from gpuckpt.spec import Chunk, Spec

ALIGNMENT = 64


def plan_chunks(specs: Sequence[Spec], *, chunk_nbytes: int) -> Iterator[Chunk]:
    """Cut every tensor into chunks of at most `chunk_nbytes`, in order.

    No element is cut in two; a tensor without bytes has no chunks.
    """
    for tensor, spec in enumerate(specs):
        itemsize = to_numpy(spec.dtype).itemsize
        longest = max(chunk_nbytes // itemsize, 1) * itemsize
        for start in range(0, spec.nbytes, longest):
            yield Chunk(tensor, start, min(longest, spec.nbytes - start))


def batch_chunks(
    chunks: Iterable[Chunk], *, batch_nbytes: int, most: int = 1 << 20
) -> Iterator[list[Chunk]]:
    """Put chunks that follow each other together, as many as fit `batch_nbytes`, `most` of them.

    Thousands of small tensors then cost a few rounds through the stages, not
    thousands.  One chunk that is larger makes a batch of its own.
    """
    batch: list[Chunk] = []
    room = batch_nbytes
    for chunk in chunks:
        nbytes = aligned(chunk.nbytes)
        if batch and (nbytes > room or len(batch) == most):
            yield batch
            batch, room = [], batch_nbytes
        batch.append(chunk)
        room -= nbytes
    if batch:
        yield batch


def aligned(nbytes: int) -> int:
    """`nbytes`, rounded up so that what follows begins on a cache line."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
