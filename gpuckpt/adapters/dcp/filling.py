"""Bring what a load plan asks for where its planner wants it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from gpuckpt.adapters.dcp.contents import Contents, Leaf
from gpuckpt.adapters.dcp.tensors import is_reached
from gpuckpt.arrays import Tensor, look
from gpuckpt.arrays.view import shard
from gpuckpt.boxes import Box
from gpuckpt.errors import InvalidError, MismatchError
from gpuckpt.reading import Job
from gpuckpt.resources import Resources
from gpuckpt.restore import restore_tensors
from gpuckpt.stores import Store
from gpuckpt.tensors import TensorEntry

# What a planner is asked for at a time, which may take memory for it.
TOGETHER_NBYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class _Filling:
    """A read item, its target, and what is filled: that, or a copy of the type that was saved."""

    item: ReadItem
    row: TensorEntry
    target: Any
    filled: Any
    tensor: Tensor


def fill(
    items: Sequence[ReadItem],
    planner: LoadPlanner,
    contents: Contents,
    store: Store,
    resources: Resources,
    *,
    unpickle: bool,
) -> None:
    """Read the items' boxes, decode and check them, and put them where the planner wants them.

    Of each stored shard only those chunks are read that have some of the box.

    Raises:
        CorruptError: bytes aren't what was written; it names tensor, file and offset.
        MismatchError: a target has another shape than the planner asked for.
        InvalidError: an object can only be unpickled, and `unpickle` isn't set.
    """
    for item in items:
        if item.type == LoadItemType.BYTE_IO:
            leaf = contents.leaf(item.storage_index.fqn)
            data = _bytes_of(leaf, contents, store, resources, unpickle=unpickle)
            planner.load_bytes(item, data)
    tensors = [item for item in items if item.type == LoadItemType.TENSOR]
    for batch in _batches(tensors, planner, contents):
        rows = {id(one.row): one.row for one in batch}
        targets: dict[int, list[Tensor]] = {}
        for one in batch:
            targets.setdefault(id(one.row), []).append(one.tensor)
        jobs = [Job(store, rows[at], tuple(each)) for at, each in targets.items()]
        restore_tensors(jobs, resources)
        for one in batch:
            if one.filled is not one.target:
                one.target.copy_(one.filled)
            planner.commit_tensor(one.item, one.target)


def _batches(
    items: Sequence[ReadItem], planner: LoadPlanner, contents: Contents
) -> Iterator[list[_Filling]]:
    """The items with their targets, those of one shard stored together, as many as may be."""
    batch: list[_Filling] = []
    nbytes = 0
    for item in sorted(items, key=lambda one: one.storage_index.fqn):
        one = _filling(item, planner, contents)
        if batch and nbytes + one.tensor.spec.nbytes > TOGETHER_NBYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append(one)
        nbytes += one.tensor.spec.nbytes
    if batch:
        yield batch


def _filling(item: ReadItem, planner: LoadPlanner, contents: Contents) -> _Filling:
    index = item.storage_index
    own = tuple(index.offset or [0] * len(item.lengths))
    offset = tuple(int(a) + int(b) for a, b in zip(own, item.storage_offsets, strict=True))
    box = Box(offset, tuple(map(int, item.lengths)))
    row = contents.row(contents.leaf(index.fqn), index.offset, box)
    target = planner.resolve_tensor(item).detach()
    if tuple(target.shape) != box.shape:
        raise MismatchError(
            f"{index.fqn}: {box} was asked for, to fill a tensor of {tuple(target.shape)}",
            hint="see to the planner",
        )
    filled = target
    seen = look(target, index.fqn) if is_reached(target) else None
    if seen is None or not seen.writable or seen.spec.dtype != row.spec.dtype:
        filled = torch.empty(box.shape, dtype=getattr(torch, row.spec.dtype))
        seen = look(filled, index.fqn)
    assert seen is not None
    return _Filling(item, row, target, filled, shard(seen, box, row.spec.full_shape))


def _bytes_of(
    leaf: Leaf, contents: Contents, store: Store, resources: Resources, *, unpickle: bool
) -> io.BytesIO:
    """An object in the bytes that DCP's planners read, which `torch.save` makes.

    Stored ones are read with weights_only, which makes no objects but tensors
    and plain containers, and are made anew: planners of DCP's unpickle
    whatever they get.
    """
    made = io.BytesIO()
    if not leaf.opaque:
        torch.save(leaf.value, made)
        made.seek(0)
        return made
    row = contents.bytes_row(leaf)
    room = np.empty(row.spec.shape, np.uint8)
    target = look(room, row.spec.name)
    assert target is not None
    restore_tensors([Job(store, row, (target,))], resources)
    stored = io.BytesIO(room.tobytes())
    if unpickle:
        return stored
    try:
        value = torch.load(stored, weights_only=True, map_location="cpu")
    except Exception as error:
        raise InvalidError(
            f"{row.spec.name} in {contents.where} is an object that only unpickling restores, "
            f"which can run any code ({str(error).splitlines()[0]}); if you trust who wrote it, "
            "pass StorageReader(…, unpickle=True), or allow its class by "
            "torch.serialization.add_safe_globals"
        ) from error
    torch.save(value, made)
    made.seek(0)
    return made
