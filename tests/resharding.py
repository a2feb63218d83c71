"""Checkpoints of shards, without ranks: how they are written, cut and read back in tests."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuckpt.arrays import Tensor, look
from gpuckpt.boxes import Box, whole_box
from gpuckpt.inventory import Inventory, Roster
from gpuckpt.layout import CHUNK_NBYTES
from gpuckpt.manifest import Manifest
from gpuckpt.portions import jobs_of
from gpuckpt.resources import Resources
from gpuckpt.restore import restore_tensors
from gpuckpt.save import Header, save_snapshot
from gpuckpt.shards import Shards
from gpuckpt.snapshot import Planner, capture
from gpuckpt.sources import node_of
from gpuckpt.stats import Stats
from gpuckpt.stores import Store
from gpuckpt.stores.memory import MemoryStore

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Piece:
    """One shard of a tensor as some rank has it; all of the tensor without a `box`."""

    name: str
    array: Any
    box: Box | None = None
    whole: tuple[int, ...] = ()
    rank: int | None = None
    tiled: bool = False


def tensor_of(piece: Piece) -> Tensor:
    """What a leaf with a place is seen as."""
    found = look(piece.array, piece.name)
    assert found is not None
    spec = replace(found.spec, rank=piece.rank, tiled=piece.tiled)
    if piece.box is not None:
        spec = replace(spec, offset=piece.box.offset, whole=piece.whole)
    return replace(found, spec=spec)


class Run:
    """Saves the same shards again and again, by one process: a flat dict of tensors."""

    def __init__(
        self, pieces: Sequence[Piece], resources: Resources, *, split: bool = True
    ) -> None:
        self.resources = resources
        self._inventory = _inventory_of(pieces)
        self.plans = Planner(resources.chunk_nbytes, split=split).plans(self._inventory.roster)

    def save(
        self,
        store: Store,
        step: int,
        codec: str = "auto",
        previous: Manifest | None = None,
        full_every: int = 1,
    ) -> Manifest:
        """Save what they are now."""
        if codec == "delta":
            self.resources.prepare_bases(self.plans, "hold")
        devices = self.resources.devices
        snapshot = capture(self._inventory, self.plans, devices, mode="hold", host_room_nbytes=0)
        header = Header(step, None, {}, 0.0, "test")
        with store.lock():
            return save_snapshot(
                *(snapshot, header, store, self.resources),
                codec=codec,
                previous=previous,
                stats=Stats(step),
                full_every=full_every,
            )


def _inventory_of(pieces: Sequence[Piece]) -> Inventory:
    tensors = [tensor_of(piece) for piece in pieces]
    specs = tuple(tensor.spec for tensor in tensors)
    numbers: dict[str, dict[int | None, int]] = {}
    for at, spec in enumerate(specs):
        numbers.setdefault(spec.name, {}).setdefault(spec.rank, at)
    template = {"dict": [[name, node_of(ranks)] for name, ranks in numbers.items()]}
    roster = Roster(template, specs, tuple(tensor.strides for tensor in tensors))
    addresses = np.array([tensor.address for tensor in tensors], np.uint64)
    return Inventory(roster, addresses, [tensor.owner for tensor in tensors], ())


def save_pieces(
    store: Store,
    pieces: Sequence[Piece],
    step: int = 1,
    *,
    codec: str = "auto",
    previous: Manifest | None = None,
    full_every: int = 1,
    chunk_nbytes: int = 1 << 20,
    memory: str = "64 MiB",
) -> Manifest:
    """Save all shards of all ranks once."""
    resources = Resources(memory, chunk_nbytes=chunk_nbytes)
    run = Run(pieces, resources, split=codec != "raw")
    return run.save(store, step, codec, previous, full_every)


def split(name: str, array: Array, boxes: Sequence[Box]) -> list[Piece]:
    """The shards of a tensor at these boxes, each with memory of its own."""
    return [Piece(name, array[box.slices].copy(), box, array.shape) for box in boxes]


def restore_pieces(
    store: Store,
    manifest: Manifest,
    pieces: Sequence[Piece],
    *,
    memory: str = "64 MiB",
    chunk_nbytes: int = CHUNK_NBYTES,
    resources: Resources | None = None,
) -> None:
    """Fill shards in place from a checkpoint, by names; with `resources`, by these."""
    shards = Shards(manifest)
    positions = {entry.spec.tensor: at for at, entry in enumerate(manifest.tensors)}
    targets: dict[int, list[Tensor]] = {}
    for piece in pieces:
        target = tensor_of(piece)
        assert shards.lack(positions[target.spec.tensor], target.spec.box) is None
        targets.setdefault(shards.first(positions[target.spec.tensor]), []).append(target)
    resources = resources or Resources(memory, chunk_nbytes=chunk_nbytes)
    restore_tensors(list(jobs_of(shards, store, targets)), resources)


def grid(shape: Sequence[int], cuts: Sequence[Sequence[int]]) -> list[Box]:
    """The boxes between cuts along each axis; equal cuts give empty boxes."""
    spans = [
        list(itertools.pairwise([0, *sorted(axis), extent]))
        for axis, extent in zip(cuts, shape, strict=True)
    ]
    return [
        Box(tuple(a for a, _ in cell), tuple(b - a for a, b in cell))
        for cell in itertools.product(*spans)
    ]


def divided(shape: Sequence[int], ways: Mapping[int, int]) -> list[Box]:
    """The boxes of an even division along some axes, as torch divides: the last may be empty."""
    cuts = []
    for axis, extent in enumerate(shape):
        count = ways.get(axis, 1)
        step = -(-extent // count)
        cuts.append([min(at * step, extent) for at in range(1, count)])
    return grid(shape, cuts)


class CountingStore(MemoryStore):
    """Counts the bytes that are read of segments."""

    def __init__(self) -> None:
        super().__init__()
        self.read_nbytes = 0

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`, and count it."""
        super().read_into(name, offset, buffer)
        if name.endswith(".segment"):
            self.read_nbytes += buffer.nbytes


def needed_nbytes(manifest: Manifest, boxes: Mapping[str, Sequence[Box]]) -> float:
    """Encoded bytes that boxes of tensors are, in proportion to their share of each shard."""
    found = 0.0
    for entry in manifest.tensors:
        own = entry.spec.box
        encoded = sum(link.extent.length for chunk in entry.chunks for link in chunk.chain)
        for box in boxes.get(entry.spec.name, ()):
            common = own & box
            if common is not None:
                found += encoded * common.count / own.count
    return found


def everything(shape: Sequence[int]) -> Box:
    """The box of a whole tensor."""
    return whole_box(tuple(shape))
