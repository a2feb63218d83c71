"""A few bytes of a GPU's tensors, for a look at them: small copies, without a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gpuckpt.devices import Bytes
from gpuckpt.devices.stream import OwnStream
from gpuckpt.plan import batch_chunks
from gpuckpt.planes import join
from gpuckpt.spec import Chunk

# Where planes of a run lie, by their addresses, how many bytes each has, and whether its elements
# are turned.
Places = tuple[Sequence[int], int, bool]


def rounds(chunks: Sequence[Chunk], room: Bytes) -> Iterator[tuple[Chunk, ...]]:
    """Chunks that `room` takes at a time."""
    return batch_chunks(chunks, lambda chunk: chunk.nbytes, batch_nbytes=room.size)


def bring(every: Sequence[Places], room: Bytes, stream: OwnStream) -> Callable[[], list[bytes]]:
    """Begin to copy runs to host memory; what is to be called once they are there gives them."""
    spans, at = [], 0
    for addresses, nbytes, turned in every:
        spans.append((at, len(addresses), nbytes, turned))
        for address in addresses:
            stream.to_host(room[at : at + nbytes], address)
            at += nbytes
    return lambda: [
        _joined(room[at:][: width * nbytes], width, turned=turned)
        for at, width, nbytes, turned in spans
    ]


def _joined(planes: Bytes, width: int, *, turned: bool) -> bytes:
    raw = np.empty_like(planes)
    join(list(planes.reshape(max(width, 1), -1)), raw, turned=turned)
    return raw.tobytes()
