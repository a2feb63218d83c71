"""Leaves that have no memory yet: a restore makes it, where each box is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from gpuckpt.arrays.view import Tensor, shard
from gpuckpt.boxes import Box, Shape
from gpuckpt.dtypes import to_numpy
from gpuckpt.spec import Spec


@dataclass(frozen=True, slots=True, eq=False)
class Hollow:
    """A tensor that is wanted as new arrays; a restore puts a `Filled` in its place.

    `dtype` is a name of `gpuckpt.dtypes`, `shape` that of the whole tensor, and
    `places` are boxes of it, none of them twice, each with the name of the
    device on which it is wanted.
    """

    dtype: str
    shape: Shape
    places: tuple[tuple[Box, str], ...]

    def tensors(self, name: str) -> tuple[Tensor, ...]:
        """Its boxes as tensors called `name`, of one element that stands for all."""
        element = np.zeros((), to_numpy(self.dtype))
        found = []
        for box, device in self.places:
            spec = Spec(name, self.dtype, box.shape, None, "jax", device)
            array = np.broadcast_to(element, box.shape)
            found.append(shard(Tensor(spec, array, self, writable=False), box, self.shape))
        return tuple(found)


@dataclass(frozen=True, slots=True, eq=False)
class Filled:
    """What a `Hollow` has become: each box's new tensor, on its device."""

    made: Mapping[Box, Tensor]

    def tensors(self, name: str) -> tuple[Tensor, ...]:
        """The same, called `name`."""
        specs = (replace(one.spec, name=name, kind="jax") for one in self.made.values())
        pairs = zip(self.made.values(), specs, strict=True)
        return tuple(replace(one, spec=spec, writable=False) for one, spec in pairs)
