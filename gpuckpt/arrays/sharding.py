"""Recognise a leaf as parts of a tensor that many processes hold together.

These are `Sharded`, torch's `DTensor` and `ShardedTensor`, and `jax.Array`s on
several devices.  What lies elsewhere is neither asked for nor moved.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from gpuckpt.arrays import dtensor, view
from gpuckpt.arrays.hollow import Filled, Hollow
from gpuckpt.arrays.view import Tensor
from gpuckpt.boxes import Box, Shape, whole_box
from gpuckpt.errors import UnsupportedError
from gpuckpt.sharded import Sharded

Form = Literal["Sharded", "DTensor", "ShardedTensor", "jax", "Hollow"]


@dataclass(frozen=True, slots=True)
class Part:
    """An array of any library that holds a box of a tensor; all of it, or what is `within`."""

    array: Any
    box: Box
    within: Box | None = None


def look(leaf: Any, name: str) -> Tensor | None:
    """See `leaf` as the one tensor, or shard, called `name`; None if it isn't an array at all.

    Nothing is copied and nothing waited for.

    Raises:
        UnsupportedError: it is an array, but not one that can be saved, or
            several shards.
    """
    found = look_all(leaf, name)
    if len(found) > 1:
        raise UnsupportedError(name, f"it is {len(found)} shards here, where one was looked for")
    return found[0] if found else None


def look_all(leaf: Any, name: str) -> tuple[Tensor, ...]:
    """The shards that this process has of a leaf, each with its place; none if it isn't an array.

    No two have the same place.  Where it has nothing of an array, it is one
    empty shard; else none is empty.  Nothing is copied and nothing waited for.

    Raises:
        UnsupportedError: it is an array, but not one that can be saved.
    """
    form = None if type(leaf) is np.ndarray else form_of(leaf)
    if form == "Hollow":
        hollow: tuple[Tensor, ...] = leaf.tensors(name)
        return hollow
    if form is None:
        found = view.look(leaf, name)
        return () if found is None else (found,)
    if form == "jax":
        view.checked(leaf, name)
    whole = tuple(map(int, leaf.shape))
    shards: dict[Box, Tensor] = {}
    for part in parts(leaf, form, name):
        if part.box not in shards:
            shards[part.box] = _shard(part, whole, name)
    if not shards:
        return (_nothing(leaf, form, whole, name),)
    return tuple(one for one in shards.values() if one.spec.nbytes) or tuple(shards.values())[:1]


def form_of(leaf: Any) -> Form | None:
    """What kind of sharded array a leaf is; None if it is none."""
    if isinstance(leaf, np.ndarray):
        return None
    if isinstance(leaf, Sharded):
        return "Sharded"
    if isinstance(leaf, Hollow | Filled):
        return "Hollow"
    for base in type(leaf).__mro__:
        library = base.__module__.partition(".")[0]
        if library == "torch" and base.__name__ in ("DTensor", "ShardedTensor"):
            return base.__name__  # type: ignore[return-value]
        if library in ("jax", "jaxlib") and hasattr(type(leaf), "addressable_shards"):
            return "jax" if len(leaf.sharding.device_set) > 1 else None
    return None


def parts(leaf: Any, form: Form, name: str) -> Iterator[Part]:
    """The arrays that this process holds of such a leaf; some may hold the same elements."""
    if form == "Sharded":
        yield Part(leaf.array, leaf.box)
    elif form == "DTensor":
        yield from _of_dtensor(leaf, name)
    elif form == "ShardedTensor":
        for one in leaf.local_shards():
            place = one.metadata
            yield Part(one.tensor, Box(tuple(place.shard_offsets), tuple(place.shard_sizes)))
    else:
        whole = whole_box(leaf.shape)
        for one in leaf.addressable_shards:
            ends = [taken.indices(n)[:2] for taken, n in zip(one.index, whole.shape, strict=True)]
            shape = tuple(last - first for first, last in ends)
            yield Part(one.data, Box(tuple(first for first, _ in ends), shape))


def local_tensor(leaf: Any) -> Any:
    """A DTensor's own; `to_local()` is for autograd, and takes a hundred times as long."""
    return leaf._local_tensor  # noqa: SLF001


def _of_dtensor(leaf: Any, name: str) -> Iterator[Part]:
    mesh, shape, local = leaf.device_mesh, tuple(leaf.shape), local_tensor(leaf)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return
    if type(local).__name__ == "AsyncCollectiveTensor":
        local = local.wait()
    found = dtensor.boxes(name, shape, tuple(mesh.shape), coordinate, leaf.placements)
    held = tuple(map(int, local.shape))
    ends = [inside.end for _, inside in found]
    own = tuple(map(max, *ends)) if len(ends) > 1 else ends[0]
    if held != own:
        raise UnsupportedError(
            name,
            f"a DTensor of shape {shape} whose local tensor has shape {held}, where its "
            f"placements {leaf.placements} give {own}; save it as a Sharded",
        )
    for box, inside in found:
        yield Part(local, box, inside if len(found) > 1 else None)


def _shard(part: Part, whole: Shape, name: str) -> Tensor:
    seen = None if form_of(part.array) else view.look(part.array, name)
    if seen is None:
        kind = type(part.array).__name__
        raise UnsupportedError(name, f"a shard that is no array in one piece ({kind})")
    own = part.box.shape if part.within is None else None
    if own not in (None, seen.spec.shape):
        raise UnsupportedError(name, f"a shard of {own} whose array has shape {seen.spec.shape}")
    return view.shard(seen, part.box, whole, part.within)


def _nothing(leaf: Any, form: Form, whole: Shape, name: str) -> Tensor:
    """An empty shard, for a tensor that lies on other processes alone."""
    if not whole:
        reason = "a scalar that lies on other processes alone; leave it out of this one's state"
        raise UnsupportedError(name, reason)
    shape = (0, *whole[1:])
    box = Box((0,) * len(shape), shape)
    if form == "jax":
        seen = _shard(Part(np.empty(shape, leaf.dtype), box), whole, name)
        return replace(seen, spec=replace(seen.spec, kind="jax"))
    return _shard(Part(sys.modules["torch"].empty(shape, dtype=leaf.dtype), box), whole, name)
