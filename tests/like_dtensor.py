"""As much of torch's DTensor as gpuckpt asks for, over `like_torch`, for machines without torch."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.like_torch import Array, Tensor


@dataclass(frozen=True)
class Shard:
    """Cut along an axis, as `torch.chunk` cuts."""

    dim: int

    def is_shard(self) -> bool:
        return True

    def is_replicate(self) -> bool:
        return False

    def is_partial(self) -> bool:
        return False

    def part(self, array: Array, count: int, at: int) -> Array:
        """What part `at` of `count` has."""
        step = max(-(-array.shape[self.dim] // count), 1)
        return np.split(array, range(step, step * count, step), self.dim)[at]


@dataclass(frozen=True)
class StridedShard(Shard):
    """Cut into `split_factor` pieces, each of which is cut."""

    split_factor: int

    def part(self, array: Array, count: int, at: int) -> Array:
        pieces = [
            Shard(self.dim).part(array, self.split_factor, n) for n in range(self.split_factor)
        ]
        return np.concatenate([Shard(self.dim).part(one, count, at) for one in pieces], self.dim)


@dataclass(frozen=True)
class Replicate:
    """The same on all."""

    def is_shard(self) -> bool:
        return False

    def is_replicate(self) -> bool:
        return True

    def is_partial(self) -> bool:
        return False

    def part(self, array: Array, count: int, at: int) -> Array:
        del count, at
        return array


@dataclass(frozen=True)
class Partial(Replicate):
    """A summand each."""

    def is_replicate(self) -> bool:
        return False

    def is_partial(self) -> bool:
        return True


class Mesh:
    """Ranks in rows and columns, and this one's place among them; None if it has none."""

    def __init__(self, shape: tuple[int, ...], coordinate: tuple[int, ...] | None) -> None:
        self.shape, self._coordinate = shape, coordinate

    def get_coordinate(self) -> list[int] | None:
        return None if self._coordinate is None else list(self._coordinate)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mesh) and other.shape == self.shape

    def __hash__(self) -> int:
        return hash(self.shape)


class DTensor(Tensor):
    """A tensor that lies on a mesh: `full` is cut as `placements` say."""

    __module__ = "torch.distributed.tensor"

    def __init__(self, full: Array, mesh: Mesh, placements: tuple[Any, ...]) -> None:
        super().__init__(full)
        self.device_mesh, self.placements = mesh, placements
        coordinate = mesh.get_coordinate()
        for at, placement in enumerate(placements if coordinate is not None else ()):
            assert coordinate is not None
            full = placement.part(full, mesh.shape[at], coordinate[at])
        self._local_tensor = Tensor(np.ascontiguousarray(full) if full.ndim else full)


def modules() -> dict[str, Any]:
    """The modules that it is in."""
    module: Any = types.ModuleType("torch.distributed.tensor")
    module.DTensor = DTensor
    return {"torch.distributed.tensor": module}
