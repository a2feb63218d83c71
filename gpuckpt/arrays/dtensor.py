"""Which elements of a torch DTensor its local tensor has: from mesh and placements alone.

No rank is asked for anything.  An axis is cut from the first dimension of the
mesh to the last, each time as `torch.chunk` cuts: parts of one size, the last
ones smaller or empty.  A `_StridedShard` cuts each of `split_factor` such
parts, so that what a rank has along an axis may be several runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, product
from typing import Any

from gpuckpt.boxes import Box, Shape
from gpuckpt.errors import UnsupportedError

# From an index up to before another.
Run = tuple[int, int]


def boxes(
    name: str, shape: Shape, mesh: Shape, coordinate: Sequence[int], placements: Sequence[Any]
) -> list[tuple[Box, Box]]:
    """The boxes of a tensor of `shape` that lie at `coordinate` of the mesh.

    With each of them its box in the local tensor; an empty one if there is nothing.

    Raises:
        UnsupportedError: a placement says something else than which elements lie where.
    """
    axes: list[list[Run]] = [[(0, extent)] for extent in shape]
    for extent, at, placement in zip(mesh, coordinate, placements, strict=True):
        if placement.is_replicate():
            continue
        split = getattr(placement, "split_factor", None)
        if split is None and not placement.is_shard():
            raise UnsupportedError(name, _no_shard(placement))
        axis = placement.dim
        axes[axis] = _cut(axes[axis], extent, at, int(split or 1))
    if not all(axes):
        offset = tuple(runs[0][0] if runs else n for runs, n in zip(axes, shape, strict=True))
        own = tuple(map(_size, axes))
        return [(Box(offset, own), Box((0,) * len(own), own))]
    return [_box(chosen) for chosen in product(*map(_placed, axes))]


def _no_shard(placement: Any) -> str:
    if placement.is_partial():
        return (
            f"a DTensor that is {placement!r}: each rank has but a summand of it; "
            "redistribute it to Shard or Replicate first"
        )
    return f"a DTensor that is placed by {placement!r}, which isn't known here"


def _cut(runs: list[Run], count: int, at: int, split: int) -> list[Run]:
    """What part `at` of `count` has of these runs, one after the other, in `split` times."""
    found: list[Run] = []
    for part in range(split):
        first, last = _chunk(_size(runs), split, part)
        low, high = _chunk(last - first, count, at)
        found += _taken(runs, first + low, first + high)
    joined: list[Run] = []
    for begin, end in found:
        if joined and joined[-1][1] == begin:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((begin, end))
    return joined


def _chunk(size: int, count: int, at: int) -> Run:
    step = -(-size // count)
    return min(step * at, size), min(step * (at + 1), size)


def _taken(runs: list[Run], first: int, last: int) -> list[Run]:
    """Elements `first` … `last` of those that the runs have, one after the other."""
    found: list[Run] = []
    for (begin, end), before in zip(runs, _before(runs), strict=True):
        low, high = max(first, before), min(last, before + end - begin)
        if low < high:
            found.append((begin + low - before, begin + high - before))
    return found


def _placed(runs: list[Run]) -> list[tuple[int, int, int]]:
    """Each run's place in the tensor and in the local tensor, and its length."""
    return [(a, at, b - a) for (a, b), at in zip(runs, _before(runs), strict=True)]


def _box(chosen: Sequence[tuple[int, int, int]]) -> tuple[Box, Box]:
    shape = tuple(length for _, _, length in chosen)
    offset, local = tuple(at for at, _, _ in chosen), tuple(at for _, at, _ in chosen)
    return Box(offset, shape), Box(local, shape)


def _before(runs: list[Run]) -> list[int]:
    """How many elements come before each run."""
    return list(accumulate((end - begin for begin, end in runs), initial=0))[:-1]


def _size(runs: list[Run]) -> int:
    return sum(end - begin for begin, end in runs)
