"""How ranks save their shards for other ranks: `reshard`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest

import gpuckpt
from gpuckpt.boxes import Box
from gpuckpt.commit import open_step
from gpuckpt.cutting import Reshard
from gpuckpt.groups import Group
from tests.ranks import run_ranks
from tests.resharding import CountingStore, divided, needed_nbytes

SHAPE = (512, 4096)


def array() -> np.ndarray:
    numbers = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    return numbers.astype(ml_dtypes.bfloat16)


def saved_by(
    boxes: Sequence[Box], reshard: Reshard | Literal["auto"], **options: Any
) -> CountingStore:
    """A checkpoint of as many ranks."""
    store, whole = CountingStore(), array()

    def work(group: Group) -> None:
        box = boxes[group.rank]
        mine = gpuckpt.Sharded(whole[box.slices].copy(), SHAPE, box.offset)
        with gpuckpt.Checkpointer(
            "",
            store=store,
            group=group,
            group_timeout=20,
            memory="64 MiB",
            reshard=reshard,
            **options,
        ) as ckpt:
            ckpt.save(1, {"w": mine}).result(20)

    run_ranks(len(boxes), work)
    return store


def ratio(store: CountingStore, wanted: Sequence[Box]) -> float:
    """Bytes of chunks that are read to those that are needed, by all ranks of another world."""
    manifest, whole = open_step(store), array()
    read = 0
    for box in wanted:
        mine = gpuckpt.Sharded(np.zeros_like(whole[box.slices]), SHAPE, box.offset)
        with gpuckpt.Checkpointer("", store=store, memory="64 MiB") as ckpt:
            store.read_nbytes = 0
            ckpt.restore({"w": mine})
            read += store.read_nbytes
        assert mine.array.tobytes() == whole[box.slices].tobytes()
    return read / needed_nbytes(manifest, {"w": wanted})


@pytest.mark.parametrize(
    ("saved", "wanted", "reshard"),
    [
        ({1: 2}, {1: 3}, "same"),
        ({1: 3}, {1: 2}, "same"),
        ({0: 2}, {1: 4}, "any"),
        ({1: 4}, {0: 2}, "any"),
        ({0: 2, 1: 2}, {0: 4}, "any"),
        ({1: 4}, {0: 3}, "auto"),
    ],
)
def test_ranks_of_another_world_read_what_they_need(
    saved: Mapping[int, int], wanted: Mapping[int, int], reshard: Reshard | Literal["auto"]
):
    store = saved_by(divided(SHAPE, saved), reshard)
    assert ratio(store, divided(SHAPE, wanted)) <= 1.1


def test_shards_that_are_not_to_be_cut_are_one_row_each():
    store = saved_by(divided(SHAPE, {1: 2}), "none")
    assert [entry.spec.box for entry in open_step(store).tensors] == divided(SHAPE, {1: 2})
    assert ratio(store, divided(SHAPE, {1: 4})) > 1.9


@pytest.mark.parametrize("options", [{}, {"codec": "delta"}, {"key": b"k" * 32}])
def test_chunks_are_tiled_unless_they_will_be_read_whole(options: dict[str, Any]):
    store = saved_by(divided(SHAPE, {1: 2}), "auto", **options)
    manifest = open_step(store)
    tiled = [bool(chunk.tiles) for entry in manifest.tensors for chunk in entry.chunks]
    assert all(tiled) if not options else not any(tiled)
    assert len(manifest.tensors) == 2 if not options else len(manifest.tensors) > 2


def test_what_reshard_may_be_is_told():
    with pytest.raises(gpuckpt.InvalidError, match="reshard is one of"):
        gpuckpt.Checkpointer("", store=CountingStore(), reshard="rows")  # type: ignore[arg-type]
