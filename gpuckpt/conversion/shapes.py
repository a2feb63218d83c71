"""What a stranger's file may say that a tensor's shape is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

DIMENSIONS_MAX = 64
# Of elements, an extent of 0 counted as 1: no array may have more, even one without any.
_COUNT_MAX = 1 << 48


def is_shape(extents: Sequence[Any]) -> bool:
    """Whether an array can have this shape, as far as numbers go."""
    return (
        len(extents) <= DIMENSIONS_MAX
        and all(type(extent) is int and extent >= 0 for extent in extents)
        and math.prod(max(extent, 1) for extent in extents) <= _COUNT_MAX
    )
