"""What a rank reads to know what it has: its own part if that can do, else all."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

import gpuckpt
from gpuckpt.commit import open_step
from gpuckpt.groups import Group
from gpuckpt.layout import part_step
from gpuckpt.manifest import Manifest, pack_manifest, unpack_manifest
from gpuckpt.stores.memory import MemoryStore
from tests.ranks import run_ranks


class Watched(MemoryStore):
    """Files in a dictionary, and how often each part was read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if part_step(name) is not None:
            self.reads[name] += 1
        super().read_into(name, offset, buffer)


def saved(size: int, more: Any = None) -> Watched:
    store = Watched()

    def work(group: Group) -> None:
        state = {"w": np.ones((64, 1024), np.float32), "lr": 0.1}
        if more is not None and group.rank == 1:
            state["more"] = more
        with gpuckpt.Checkpointer("", store=store, group=group, memory="64 MiB") as ckpt:
            ckpt.save(1, state).result(20)

    run_ranks(size, work)
    store.reads.clear()
    return store


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_of_as_many_reads_its_own_part_alone(rank):
    store = saved(3)
    found, whole = open_step(store, of=(rank, 3)), open_step(store)
    assert found.partial
    assert not whole.partial
    assert store.reads[whole.parts[rank].name] == 2
    assert sum(store.reads.values()) == 4
    rows = {entry.spec.label: entry for entry in whole.tensors}
    for entry in found.tensors:  # of a sample, each rank has its own copy
        same_bytes = [chunk.fingerprint for chunk in rows[entry.spec.label].chunks]
        assert [chunk.fingerprint for chunk in entry.chunks] == same_bytes


def same(one: Manifest, other: Manifest) -> bool:
    return (one.tensors, one.structure, one.partial) == (
        *(other.tensors, other.structure, other.partial),
    )


def test_all_parts_are_read_where_there_were_others_or_they_were_not_alike():
    store, other = saved(3), saved(3, more=3.5)
    for one, of in ((store, (0, 2)), (store, (3, 4)), (other, (0, 3))):
        assert same(open_step(one, of=of), open_step(one))


def test_all_parts_that_are_there_are_read_where_the_own_one_is_not():
    store = saved(3)
    name = open_step(store, parts=False).parts[1].name
    store.remove(name)
    found = open_step(store, of=(1, 3))
    assert found.absent == (name,)
    assert not found.partial


def test_packing_says_whether_structures_are_alike():
    for store, alike in ((saved(2), True), (saved(2, more=1), False)):
        manifest = open_step(store, parts=False)
        assert manifest.alike == alike
        assert unpack_manifest(pack_manifest(manifest), "") == manifest


def test_a_restore_reads_the_own_part_where_that_has_all():
    store = Watched()

    def work(group: Group) -> None:
        state = {"lr": 0.1, "scale": np.array(2.5)}
        fresh = {"lr": 0.0, "scale": np.array(0.0)}
        with gpuckpt.Checkpointer("", store=store, group=group, memory="64 MiB") as ckpt:
            ckpt.save(1, state).result(20)
            ckpt.restore(fresh)
        np.testing.assert_equal(fresh, state)

    run_ranks(3, work)
    assert [store.reads[part.name] for part in open_step(store, parts=False).parts] == [1, 1, 1]
