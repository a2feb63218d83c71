"""Split a chunk into planes, one for byte k of every element, and join them again.

numpy's version is the reference: whatever else splits gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def split(raw: Bytes, width: int, out: Bytes) -> list[Bytes]:
    """Byte k of every element together.  uint8[n·width] → `width` of uint8[n], in `out`."""
    count = raw.size // width
    elements = raw.reshape(count, width)
    planes = out[: raw.size].reshape(width, count)
    for k in range(width):
        planes[k] = elements[:, k]
    return list(planes)


def join(planes: Sequence[Bytes], out: Bytes) -> None:
    """Put elements together again: undoes `split`.  `width` of uint8[n] → uint8[n·width]."""
    elements = out.reshape(-1, len(planes))
    for k, plane in enumerate(planes):
        elements[:, k] = plane
