"""What is in the files of a save of many ranks, and what reading them takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import zstandard

from bench.ranks.alone import Row, taken, timed
from bench.ranks.counted import Counted
from bench.ranks.layouts import Shapes, inventory, model, roster
from bench.ranks.simulated import written
from gpuckpt import layout
from gpuckpt.boxes import Box
from gpuckpt.commit import commit, open_step
from gpuckpt.holdings import Holding, holdings
from gpuckpt.manifest import Manifest, Part, pack_manifest, unpack_manifest
from gpuckpt.parts import world_manifest, write_part
from gpuckpt.sharing import Shares, share_out
from gpuckpt.stores.memory import MemoryStore

STEP = 3
Told = dict[Holding, tuple[Box, ...]]


def shares_of(kind: str, ranks: int, shapes: Shapes) -> list[Told]:
    """What each rank writes of what it holds."""
    if kind == "replicated":
        same = holdings(roster(kind, 0, ranks, shapes))
        return [dict.fromkeys(same, ()) | one for one in share_out([same] * ranks)]
    held = (holdings(roster(kind, rank, ranks, shapes)) for rank in range(ranks))
    # Each its own, but for empty ones: nearly what `share_out` finds, at once.
    return [{one: (one.box,) for one in every} for every in held]


def part_of(kind: str, rank: int, ranks: int, shapes: Shapes, told: Told) -> Manifest:
    """A rank's part, as a save makes it."""
    own = Shares(rank, told, [], "same").apply(inventory(roster(kind, rank, ranks, shapes)))
    return replace(written(own, STEP, rank), ranks=ranks, rank=rank)


def saved(kind: str, ranks: int, shapes: Shapes) -> tuple[MemoryStore, Manifest, Row]:
    """A store with all parts and the manifest of a step, and what is to be said of the parts."""
    store, parts, rows, balance = MemoryStore(), list[Part](), 0, list[int]()
    for rank, told in enumerate(shares_of(kind, ranks, shapes)):
        own = part_of(kind, rank, ranks, shapes, told)
        name = layout.part_name(STEP, f"{rank:08x}", rank)
        parts.append(write_part(store, name, own))
        rows += len(own.tensors)
        balance.append(own.raw_nbytes)
    world = replace(world_manifest(parts, own), alike=True)
    commit(store, world, abandon=lambda: None)
    mean = sum(balance) / ranks
    return store, world, {"rows": rows, "most_over_mean": max(balance) / mean}


def files(kind: str, ranks: int, layers: int) -> Row:
    """Sizes of the files of a step, and what packing and unpacking them takes."""
    shapes = model(layers)
    store, world, row = saved(kind, ranks, shapes)
    data, part = pack_manifest(world), bytes(store.files[world.parts[0].name])
    sizes = [part.nbytes for part in world.parts]
    own = unpack_manifest(part, "")
    return row | {
        "world_nbytes": len(data),
        "part_nbytes": sum(sizes) / ranks,
        "parts_nbytes": sum(sizes),
        "part_over_zstd": len(part) / len(zstandard.compress(part)),
        "pack_world_s": timed(lambda: pack_manifest(world)),
        "unpack_world_s": timed(lambda: unpack_manifest(data, "")),
        "pack_part_s": timed(lambda: pack_manifest(own)),
        "unpack_part_s": timed(lambda: unpack_manifest(part, "")),
    }


def opened(kind: str, ranks: int, layers: int, **how: Any) -> Row:
    """What a rank reads, in seconds and memory, to know what is in a step; `how` to open it."""
    store, _, _ = saved(kind, ranks, model(layers))

    def work() -> Row:
        counted = Counted(store)
        open_step(counted, **how)
        reads = {"reads": counted.calls["read"], "read_nbytes": counted.read_nbytes}
        return reads | {"lists": counted.calls["list"]}

    return taken(work)


def rows(sizes: Iterator[tuple[str, int, int]]) -> Iterator[Row]:
    """For each kind, ranks and layers: files, and what reading all parts or the own one takes."""
    for kind, ranks, layers in sizes:
        where = {"kind": kind, "ranks": ranks, "tensors": len(model(layers))}
        yield {"case": "files"} | where | taken(partial(files, kind, ranks, layers))
        yield {"case": "open"} | where | opened(kind, ranks, layers)
        yield {"case": "own"} | where | opened(kind, ranks, layers, of=(0, ranks))
