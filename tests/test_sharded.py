"""Shards as leaves: each process's are boxes of the whole tensor, wherever they come from."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.arrays import assembled, look, look_all, make
from gpuckpt.boxes import Box, gap, whole_box
from gpuckpt.census import Census, take_inventory
from gpuckpt.commit import open_step
from gpuckpt.devices import Devices
from gpuckpt.errors import InvalidError, UnsupportedError
from gpuckpt.stores.local import LocalStore
from tests import like_torch
from tests.changing_states import Interface
from tests.like_dtensor import DTensor, Mesh, Partial, Replicate, Shard, StridedShard, modules
from tests.strategies import Array, arrays, same


@pytest.fixture(autouse=True)
def torch(monkeypatch) -> Any:
    """A library like torch, which has DTensors."""
    module = like_torch.module()
    for name, one in {"torch": module, **modules()}.items():
        monkeypatch.setitem(sys.modules, name, one)
    return module


def counted(shape: tuple[int, ...]) -> Array:
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    """Any box of a tensor, empty or not."""
    ends = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


# Sharded


@settings(max_examples=200, deadline=None)
@given(arrays(), st.data())
def test_a_sharded_is_its_box_of_the_whole_tensor_however_its_array_lies(full, data):
    box = data.draw(boxes(full.shape))
    part = full[(*box.slices, ...)]  # the dots: a view, also of a scalar
    tensor = look(gpuckpt.Sharded(part, full.shape, box.offset), "w")
    plain = look(part, "w")
    assert tensor is not None
    assert plain is not None
    assert tensor.spec.box == box
    assert tensor.spec.full_shape == full.shape
    assert (tensor.spec == plain.spec) == (box == whole_box(full.shape))
    assert same(tensor.array, part)
    assert (tensor.address, tensor.strides) == (plain.address, plain.strides)
    assert tensor.writable == plain.writable


@settings(max_examples=100, deadline=None)
@given(arrays(), st.data())
def test_a_sharded_comes_back_in_place_from_its_own_checkpoint(tmp_path_factory, full, data):
    box = data.draw(boxes(full.shape))
    part = full[(*box.slices, ...)].copy()
    wanted, root = part.copy(), tmp_path_factory.mktemp("root")
    state = {"w": gpuckpt.Sharded(part, full.shape, box.offset)}
    gpuckpt.save(root, state)
    (row,) = open_step(LocalStore(root)).tensors
    assert (row.spec.box, row.spec.full_shape) == (box, full.shape)
    part.reshape(-1).view(np.uint8)[...] = 0x55
    with gpuckpt.Checkpointer(root) as ckpt:
        ckpt.restore(state)
    assert same(part, wanted)


@pytest.mark.parametrize(
    ("shape", "offset", "why"),
    [
        ((4, 4), (3, 0), r"\[3:5, 0:3\] isn't in a tensor of shape \(4, 4\)"),
        ((4, 2), (0, 0), "isn't in a tensor"),
        ((4,), (0, 0), "2, 1 and 2"),
        ((4, 4), (0,), "2, 2 and 1"),
        ((4, 4), (-1, 0), "offset can't be negative"),
        ((4, -4), (0, 0), "shape can't be negative"),
        ((4, 4.0), (0, 0), "shape is one integer for each axis"),
        (4, (0, 0), "shape is one integer for each axis"),
    ],
)
def test_a_box_that_doesnt_fit_says_so_at_once(shape, offset, why):
    with pytest.raises(InvalidError, match=why):
        gpuckpt.Sharded(np.zeros((2, 3)), shape, offset)


@pytest.mark.parametrize("array", [1.0, None, "w", [[1.0]]])
def test_what_has_no_shape_cant_be_sharded(array):
    with pytest.raises(InvalidError, match="an array with a shape"):
        gpuckpt.Sharded(array, (4,), (0,))


def test_a_sharded_of_what_is_sharded_itself_is_refused():
    inner = gpuckpt.Sharded(np.zeros(2), (4,), (0,))
    with pytest.raises(InvalidError, match="Sharded"):
        gpuckpt.Sharded(inner, (8,), (0,))
    leaf = DTensor(counted((4,)), Mesh((2,), (0,)), (Shard(0),))
    with pytest.raises(UnsupportedError, match="one piece"):
        look(gpuckpt.Sharded(leaf, (8,), (0,)), "w")
    with pytest.raises(UnsupportedError, match="one piece"):
        look(gpuckpt.Sharded(np.float32(3), (), ()), "w")


def test_arrays_of_any_library_may_be_sharded():
    array = counted((2, 3))
    whole: Any = np.array([4, 3])
    for one in (array, Interface(array), like_torch.Tensor(array)):
        tensor = look(gpuckpt.Sharded(one, whole, [2, 0]), "w")
        assert tensor is not None
        assert tensor.spec.label == "w[2:4, 0:3]"
        assert np.shares_memory(tensor.array, array)


def test_a_sharded_says_what_it_is():
    assert repr(gpuckpt.Sharded(np.zeros(2), (4,), (1,))) == "Sharded([1:3] of (4,))"


# DTensor


def placements(axes: int, most: int) -> st.SearchStrategy[tuple[Any, ...]]:
    axis = st.integers(0, axes - 1)
    some = st.one_of(
        st.just(Replicate()),
        axis.map(Shard),
        st.builds(StridedShard, axis, st.integers(1, 4)),
    )
    return st.lists(some, min_size=most, max_size=most).map(tuple)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_boxes_of_all_ranks_of_a_mesh_have_the_full_tensor_cut_as_numpy_cuts(data):
    shape = data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=3).map(tuple))
    mesh = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
    where = data.draw(placements(len(shape), len(mesh)))
    full, found = counted(shape), []
    for coordinate in itertools.product(*map(range, mesh)):
        leaf = DTensor(full, Mesh(mesh, coordinate), where)
        held = leaf._local_tensor.numpy()
        shards = look_all(leaf, "w")
        assert sum(one.array.size for one in shards) == held.size
        for one in shards:
            assert one.spec.full_shape == shape
            assert same(one.array, full[one.spec.box.slices])
            assert np.shares_memory(one.array, held) or not held.size
            assert one.writable
        found += [one.spec.box for one in shards]
    assert gap(found, whole_box(shape)) is None
    assert sum(box.count for box in found) == full.size * math.prod(
        n for n, placement in zip(mesh, where, strict=True) if placement.is_replicate()
    )


def test_summands_and_unknown_placements_are_refused_by_name():
    class Ragged(Partial):
        def is_partial(self) -> bool:
            return False

    full, mesh = counted((4,)), Mesh((2,), (0,))
    with pytest.raises(UnsupportedError, match=r"grad.*redistribute"):
        look(DTensor(full, mesh, (Partial(),)), "grad")
    with pytest.raises(UnsupportedError, match=r"w.*isn't known"):
        look(DTensor(full, mesh, (Ragged(),)), "w")


def test_a_local_tensor_that_isnt_what_its_placements_say_is_refused():
    leaf = DTensor(counted((8, 2)), Mesh((4,), (0,)), (Shard(0),))
    leaf._local_tensor = like_torch.Tensor(counted((3, 2)))
    with pytest.raises(UnsupportedError, match=r"\(3, 2\).*\(2, 2\)"):
        look(leaf, "w")


def test_look_is_for_one_shard_and_says_if_there_are_more():
    leaf = DTensor(counted((8,)), Mesh((2,), (1,)), (StridedShard(0, 2),))
    assert [one.spec.label for one in look_all(leaf, "w")] == ["w[2:4]", "w[6:8]"]
    with pytest.raises(UnsupportedError, match="2 shards"):
        look(leaf, "w")


# Censuses of shards

Make = Callable[[Array, int], Any]
MESH = Mesh((2,), (1,))
KINDS: dict[str, Make] = {
    "Sharded": lambda array, at: gpuckpt.Sharded(array, (8, *array.shape[1:]), (at, 0)),
    "Sharded of torch": lambda array, at: gpuckpt.Sharded(
        like_torch.Tensor(array), (8, *array.shape[1:]), (at, 0)
    ),
    "Sharded of another": lambda array, at: gpuckpt.Sharded(
        Interface(array), (8, *array.shape[1:]), (at, 0)
    ),
    "DTensor": lambda array, at: DTensor(
        np.concatenate([array, array]), MESH, (Shard(0) if at else StridedShard(0, 1),)
    ),
    "DTensor in two boxes": lambda array, at: DTensor(
        np.concatenate([array] * 4), MESH, (StridedShard(0, 2 + bool(at)),)
    ),
}


def described(inventory: Any) -> tuple[Any, ...]:
    roster = inventory.roster
    return (
        str(inventory.structure),
        *(roster.specs, roster.strides, inventory.addresses.tolist(), inventory.values),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_shards_is_recognised_and_its_changes_are_noticed(kind):
    new = KINDS[kind]
    state: dict[str, Any] = {f"w{at}": new(counted((4, 3)), 0) for at in range(3)}
    state |= {"plain": counted((4, 3)), "lr": 0.1, "tied": state["w1"], "empty": counted((0, 3))}
    census = Census()
    first = census.take(state)
    state |= {"lr": 0.2, "w0": new(counted((4, 3)), 0)}
    again = census.take(state)
    assert again.roster is first.roster
    assert described(again) == described(take_inventory(state))
    changes: list[Callable[[], object]] = [
        lambda: state.update(w0=new(counted((4, 3)), 4)),
        lambda: state.update(w0=new(counted((4, 2)), 4)),
        lambda: state.update(w0=new(counted((4, 2)).astype(np.int32), 4)),
        lambda: state.update(w0=new(np.asfortranarray(counted((4, 2)).astype(np.int32)), 4)),
        lambda: state.update(tied=new(counted((4, 3)), 0)),
        lambda: state.update(w2=state["w1"]),
        lambda: state.update(w1=counted((4, 3))),
    ]
    for change in changes:
        change()
        after = census.take(state)
        assert described(after) == described(take_inventory(state))
        assert census.take(state).roster is after.roster


def test_one_array_is_one_tensor_under_two_names_only_with_the_same_box():
    array = counted((4, 3))
    state = {
        "a": gpuckpt.Sharded(array, (8, 3), (0, 0)),
        "b": gpuckpt.Sharded(array, (8, 3), (0, 0)),
        "c": gpuckpt.Sharded(array, (8, 3), (4, 0)),
        "d": gpuckpt.Sharded(array, (9, 3), (0, 0)),
        "e": array,
        "f": gpuckpt.Sharded(array, (4, 3), (0, 0)),
    }
    census = Census()
    first = census.take(state)
    assert [spec.name for spec in first.specs] == ["a", "c", "d", "e"]
    assert [child["tensor"] for _, child in first.structure["dict"]] == [0, 0, 1, 2, 3, 3]
    assert census.take(state).roster is first.roster


def test_a_leaf_of_several_shards_is_several_tensors_of_one_name():
    leaf = DTensor(counted((8,)), MESH, (StridedShard(0, 2),))
    state = {"a": counted((2,)), "w": leaf, "tied": leaf, "z": counted((3,))}
    inventory = take_inventory(state)
    assert [spec.label for spec in inventory.specs] == ["a", "w[2:4]", "w[6:8]", "z"]
    assert [child["tensor"] for _, child in inventory.structure["dict"]] == [0, 1, 1, 3]


def test_a_mesh_that_is_equal_but_another_is_looked_at_anew():
    full, census = counted((8,)), Census()
    first = census.take({"w": DTensor(full, Mesh((2,), (0,)), (Shard(0),))})
    second = census.take({"w": DTensor(full, Mesh((2,), (1,)), (Shard(0),))})
    assert [spec.label for one in (first, second) for spec in one.specs] == ["w[0:4]", "w[4:8]"]


def test_shardeds_of_several_libraries_are_read_together_each_at_its_place():
    some = [counted((2, 3)) for _ in range(6)]
    dressed = [like_torch.Tensor(one) if at % 2 else one for at, one in enumerate(some)]
    state = {str(at): gpuckpt.Sharded(one, (4, 3), (2, 0)) for at, one in enumerate(dressed)}
    census = Census()
    first, again = census.take(state), census.take(state)
    assert first.roster is again.roster
    assert again.addresses.tolist() == [one.ctypes.data for one in some]
    state["3"] = gpuckpt.Sharded(some[3], (4, 3), (2, 0))
    assert described(census.take(state)) == described(take_inventory(state))


def test_an_array_in_a_sharded_that_becomes_one_of_another_type_is_looked_at():
    array, census = counted((2, 3)), Census()
    census.take({"w": gpuckpt.Sharded(array, (4, 3), (2, 0))})
    masked = np.ma.masked_array(array, mask=True)
    for take in (census.take, take_inventory):
        with pytest.raises(UnsupportedError, match="w"):
            take({"w": gpuckpt.Sharded(masked, (4, 3), (2, 0))})


# Made anew


@settings(max_examples=100, deadline=None)
@given(arrays(), st.data())
def test_a_leaf_that_cant_be_filled_is_made_anew_with_its_place(full, data):
    box = data.draw(boxes(full.shape))
    part = full[(*box.slices, ...)]
    for leaf in (part, gpuckpt.Sharded(part, full.shape, box.offset)):
        (seen,) = look_all(leaf, "w")
        new = make(seen.spec, Devices()["cpu"])
        new.array[...] = part
        again = assembled(leaf, [new], "numpy")
        (found,) = look_all(again, "w")
        assert type(again) is type(leaf)
        assert found.spec.box == seen.spec.box
        assert found.spec.full_shape == seen.spec.full_shape
        assert same(found.array, part)


def test_a_dtensor_that_cant_be_filled_says_so():
    leaf = DTensor(counted((8,)), MESH, (Shard(0),))
    (seen,) = look_all(leaf, "w")
    with pytest.raises(UnsupportedError, match=r"w.*clone"):
        assembled(leaf, [seen], "torch")


def test_its_array_can_be_changed_and_replaced_by_one_of_its_shape_and_nothing_else():
    leaf = gpuckpt.Sharded(np.zeros((2, 3)), shape=(4, 3), offset=(2, 0))
    leaf.array += 1
    assert (leaf.array == 1).all()
    leaf.array = np.full((2, 3), 7, np.float32)
    with pytest.raises(InvalidError, match=r"only its array.*\(2, 3\)"):
        leaf.array = np.zeros((3, 3))
    for name in ("shape", "offset"):
        with pytest.raises(InvalidError, match="only its array"):
            setattr(leaf, name, (9, 9))
    assert leaf.box == Box((2, 0), (2, 3))
