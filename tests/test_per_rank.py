"""What each rank has of its own: marked as its own among ranks, as it was with one process."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import gpuckpt
from gpuckpt.census import Census, take_inventory
from gpuckpt.structure import from_json, of_one, walk_json
from tests.often import often
from tests.strategies import same, states


class Loader:
    """Where a run is in its data."""

    def __init__(self) -> None:
        self.at, self.order = 0, np.arange(5)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at, self.order = state["at"], state["order"]


class OwnLoader(Loader):
    """One that each rank has for itself."""

    per_rank = True


def test_a_mapping_a_list_and_an_array_come_back_in_place(tmp_path):
    inner: OrderedDict[str, Any] = OrderedDict(epoch=3, seen=[1, 2], weights=np.ones(3))
    state = {"position": gpuckpt.PerRank(inner)}
    gpuckpt.save(tmp_path, state)
    seen, weights = inner["seen"], inner["weights"]
    inner.update(epoch=0, more=1)
    seen.append(9)
    weights[:] = 0
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.restore(state)
    assert state["position"].value is inner
    assert list(inner) == ["epoch", "seen", "weights"]
    assert (inner["epoch"], inner["seen"]) == (3, [1, 2])
    assert inner["seen"] is seen
    assert inner["weights"] is weights
    assert weights.tolist() == [1, 1, 1]


@pytest.mark.parametrize("value", [5, "text", None, (1, [2]), [], {}, [1, {"a": 2}]])
def test_other_values_are_replaced(tmp_path, value):
    state = {"own": gpuckpt.PerRank(value)}
    gpuckpt.save(tmp_path, state)
    state["own"].value = type(value)() if isinstance(value, list | dict) else "other"
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.restore(state)
    assert state["own"].value == value


def test_an_array_alone_comes_back_in_place(tmp_path):
    array = np.arange(4.0)
    state = {"own": gpuckpt.PerRank(array)}
    gpuckpt.save(tmp_path, state)
    array[:] = 0
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.restore(state)
    assert state["own"].value is array
    assert array.tolist() == [0, 1, 2, 3]


def test_longer_and_shorter_lists_become_what_was_saved():
    own = gpuckpt.PerRank([1, 2, 3])
    here = own.value
    for saved in ([4], [5, 6, 7, 8], []):
        own.load_state_dict(list(saved))
        assert own.value is here
        assert here == saved


def test_an_object_is_asked_itself_and_one_inside_of_it_too(tmp_path):
    loader, inner = Loader(), Loader()
    state = {"loader": gpuckpt.PerRank(loader), "inner": gpuckpt.PerRank({"loader": inner})}
    loader.at, inner.at = 3, 4
    gpuckpt.save(tmp_path, state)
    loader.at = inner.at = 0
    loader.order[:] = 0
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.restore(state)
    assert state["loader"].value is loader
    assert state["inner"].value["loader"] is inner
    assert (loader.at, inner.at) == (3, 4)
    assert loader.order.tolist() == [0, 1, 2, 3, 4]


def test_one_leaf_of_it_may_be_restored_by_name(tmp_path):
    state = {"own": gpuckpt.PerRank({"epoch": 3, "sample": 17})}
    gpuckpt.save(tmp_path, state)
    state["own"].value.update(epoch=0, sample=0)
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.restore(state, names=["own.sample"])
    assert state["own"].value == {"epoch": 0, "sample": 17}


def test_ranks_own_things_are_marked_once_each_and_in_no_file_of_one_process():
    own = {"epoch": 1, "deep": gpuckpt.PerRank(2), "loader": OwnLoader()}
    state = {"a": 1, "own": gpuckpt.PerRank(own), "rng": gpuckpt.RNG(), "b": Loader()}
    inventory = take_inventory(state)
    kinds = {key: next(iter(node)) for key, node in inventory.rank_structure["dict"]}
    assert kinds == {"a": "value", "own": "rank", "rng": "rank", "b": "object"}
    assert str(inventory.rank_structure).count("'rank'") == 2
    assert "'rank'" not in str(inventory.structure)
    assert inventory.structure == of_one(inventory.rank_structure)
    one, other = (list(walk_json(s)) for s in (inventory.structure, inventory.rank_structure))
    assert one == other


@settings(max_examples=often(100), deadline=None)
@given(states(), states())
def test_a_file_of_one_process_has_it_as_if_it_were_not_wrapped(one, other):
    """But for the object that it is."""
    wrapped = take_inventory({"a": gpuckpt.PerRank(one), "b": other})
    bare = take_inventory({"a": one, "b": other})
    assert wrapped.specs == bare.specs
    (first, second), (bare_first, bare_second) = (x.structure["dict"] for x in (wrapped, bare))
    assert second == bare_second
    assert first in (["a", {"object": bare_first[1]}], bare_first)


def test_values_in_it_are_those_of_each_save_and_the_roster_stays():
    own = gpuckpt.PerRank({"epoch": 1, "x": np.zeros(2)})
    state = {"own": own, "w": np.ones(3)}
    census = Census()
    first = census.take(state)
    assert first.structure == census.take(state).structure
    own.value["epoch"] = 2
    second = census.take(state)
    assert second.roster is first.roster
    for inventory, epoch in ((first, 1), (second, 2)):
        for structure in (inventory.structure, of_one(inventory.rank_structure)):
            assert from_json(structure)["own"]["epoch"] == epoch
    assert first.structure["dict"][1][1] is second.structure["dict"][1][1]


def test_tensors_are_private_if_they_are_nowhere_else():
    shared, own = np.zeros(3), np.ones(3)
    inner = {"shared": shared, "own": own, "again": own, "box": gpuckpt.Sharded(own, (6,), (0,))}
    inventory = take_inventory({"own": gpuckpt.PerRank(inner), "w": shared, "v": np.ones(4)})
    names = [spec.name for spec in inventory.specs]
    assert names == ["own.shared", "own.own", "own.box", "v"]
    assert inventory.roster.private == {1, 2}
    assert take_inventory({"w": shared}).roster.private == set()


def test_a_class_says_itself_that_each_rank_has_its_own():
    inventory = take_inventory({"loader": OwnLoader(), "other": Loader()})
    assert inventory.roster.private == {0}
    assert gpuckpt.RNG.per_rank
    assert gpuckpt.PerRank.per_rank


def test_it_says_what_it_is():
    assert repr(gpuckpt.PerRank(3)) == "PerRank(3)"


def test_a_private_array_is_as_it_was_after_a_load(tmp_path):
    gpuckpt.save(tmp_path, {"own": gpuckpt.PerRank({"x": np.arange(3)})})
    assert same(gpuckpt.load(tmp_path)["own"]["x"], np.arange(3))
