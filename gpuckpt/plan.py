"""Pure arithmetic: which bytes of which tensor make up which chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gpuckpt.dtypes import to_numpy
from gpuckpt.spec import Chunk, Spec


def plan_chunks(specs: Sequence[Spec], *, chunk_nbytes: int) -> Iterator[Chunk]:
    """Cut every tensor into chunks of at most `chunk_nbytes`, in order.

    No element is cut in two; a tensor without bytes has no chunks.
    """
    for tensor, spec in enumerate(specs):
        itemsize = to_numpy(spec.dtype).itemsize
        longest = max(chunk_nbytes // itemsize, 1) * itemsize
        for start in range(0, spec.nbytes, longest):
            yield Chunk(tensor, start, min(longest, spec.nbytes - start))
