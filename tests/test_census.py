"""An inventory is what a look at every leaf gives, also of a state that was seen before."""

from __future__ import annotations

import gc
import json
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpuckpt.arrays import Tensor, host_view, look
from gpuckpt.census import Census, take_inventory
from gpuckpt.errors import UnsupportedError
from gpuckpt.inventory import Inventory
from gpuckpt.tree import flatten
from gpuckpt.values import encode_value
from tests import like_torch
from tests.changing_states import SCALARS, VALUES, Box, Interface, Play, Subclass
from tests.often import often
from tests.strategies import Array, arrays, same, states

# What an inventory has to be


def looked_at(state: Any) -> tuple[Any, ...]:
    """Structure, specs, strides, addresses and values of a state, each leaf looked at by itself."""
    flat = flatten(state)
    values: list[Any] = []
    tensors: list[Tensor] = []
    known: dict[Any, int] = {}
    for leaf, name in zip(flat.leaves, flat.names, strict=True):
        tensor = look(leaf.leaf, name)
        if tensor is None:
            leaf.node["value"] = encode_value(leaf.leaf)
            values.append(leaf.node["value"])
            continue
        where = tensor.where if tensor.spec.nbytes else id(leaf.leaf)
        leaf.node["tensor"] = known.setdefault(where, len(tensors))
        if known[where] == len(tensors):
            tensors.append(tensor)
    return (
        json.dumps(flat.structure),
        tuple(tensor.spec for tensor in tensors),
        tuple(tensor.strides for tensor in tensors),
        [tensor.address for tensor in tensors],
        json.dumps(values),
    )


def described(inventory: Inventory) -> tuple[Any, ...]:
    return (
        json.dumps(inventory.structure),
        inventory.specs,
        inventory.roster.strides,
        inventory.addresses.tolist(),
        json.dumps(inventory.values),
    )


def elements(inventory: Inventory) -> list[Array]:
    """The tensors of an inventory of host memory, seen where it says that they are."""
    return [
        host_view(address, spec, strides)
        for address, spec, strides in zip(
            inventory.addresses.tolist(), inventory.specs, inventory.roster.strides, strict=True
        )
    ]


@settings(max_examples=often(200), deadline=None)
@given(st.lists(states(), min_size=1, max_size=3))
def test_an_inventory_is_what_a_look_at_each_leaf_gives_whatever_was_seen_before(some):
    census = Census()
    for state in [*some, *some, *some[:1]]:
        wanted = looked_at(state)
        # The bytes that fill such a scalar up to 128 bits are chance, each time.
        assume(not any(name in wanted[0] for name in ("float128", "complex256")))
        first = census.take(state)
        again = census.take(state)
        assert described(first) == described(again) == described(take_inventory(state)) == wanted
        assert again.roster is first.roster
        assert len(again.owners) == len(again.specs)


@settings(max_examples=often(200), deadline=None)
@given(arrays())
def test_host_memory_is_seen_in_place_by_address_and_strides(array):
    tensor = look(array, "a")
    assert tensor is not None
    seen = host_view(tensor.address, tensor.spec, tensor.strides)
    assert same(seen, array)
    assert not array.size or np.shares_memory(seen, array)


# Changes between two looks, of all kinds and in any order


def fixed(state: Any, wanted: tuple[Any, ...]) -> tuple[Any, ...]:
    """All of a state but plain values and addresses."""
    flat = flatten(state)
    for leaf in flat.leaves:
        leaf.node["leaf"] = str(type(leaf.leaf)) if look(leaf.leaf, "") is not None else None
    containers = [type(n) for level in flat.levels for n in level.nodes]
    kinds = [kind for kind in containers if kind not in {type(v) for v in (*VALUES, *SCALARS)}]
    numbers = [row["tensor"] for row in _nodes(json.loads(wanted[0])) if list(row) == ["tensor"]]
    return (json.dumps(flat.structure), kinds, wanted[1], wanted[2], numbers)


def _nodes(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return [node, *(inner for child in node.values() for inner in _nodes(child))]
    return [inner for child in node for inner in _nodes(child)] if isinstance(node, list) else []


@settings(max_examples=often(300), deadline=None)
@given(st.randoms(use_true_random=False))
def test_no_change_of_a_state_goes_unnoticed_and_the_roster_stays_if_only_values_changed(rng):
    play, census = Play(rng), Census()
    before: tuple[Any, Any] | None = None
    for _ in range(12):
        state = play.build()
        wanted = looked_at(state)
        inventory = census.take(state)
        assert described(inventory) == wanted
        now = fixed(state, wanted)
        if before is not None and before[0] == now:
            assert inventory.roster is before[1]
        before = (now, inventory.roster)
        play.change()


def model(count: int = 3) -> dict[str, Any]:
    return {
        "model": {f"w{at}": np.full((2, 3), at, np.float32) for at in range(count)},
        "optimizer": {"state": {at: {"m": np.zeros(4), "v": np.ones(4)} for at in range(count)}},
        "tied": None,
        "lr": 0.1,
    }


def rotated(state: Any) -> None:
    state["model"]["w0"] = state["model"]["w0"].reshape(3, 2)


Change = Callable[[dict[str, Any]], object]

CHANGES: dict[str, Change] = {
    "a shape in place": lambda s: setattr(s["model"]["w0"], "shape", (3, 2)),
    "a shape": rotated,
    "strides": lambda s: s["model"].update(w0=np.zeros((3, 2), np.float32).T),
    "a dtype": lambda s: s["model"].update(w0=s["model"]["w0"].view(np.int32)),
    "a dtype that is equal but called otherwise": lambda s: s["optimizer"].update(
        t=s["optimizer"]["t"].view("M8[1000us]")
    ),
    "a name": lambda s: s["model"].update(w9=s["model"].pop("w2")),
    "the order of names": lambda s: s["model"].update(w0=s["model"].pop("w0")),
    "a key's type": lambda s: s["optimizer"]["state"].update(
        {True: s["optimizer"]["state"].pop(1)}
    ),
    "a new tie": lambda s: s["model"].update(w1=s["model"]["w0"]),
    "a tie's end": lambda s: s["ties"].update(b=np.zeros(5)),
    "a new tie of empty arrays": lambda s: s["empty"].update(b=s["empty"]["a"]),
    "a container's type": lambda s: s.update(model=OrderedDict(s["model"])),
    "an array's type": lambda s: s["model"].update(w0=s["model"]["w0"].view(Subclass)),
    "an array to a value": lambda s: s["model"].update(w0=1.5),
    "a value to an array": lambda s: s.update(lr=np.zeros(1)),
    "a leaf to a container": lambda s: s.update(lr=[0.1]),
    "a leaf that goes to the next container": lambda s: s["rows"][1].insert(0, s["rows"][0].pop()),
}


def tied_model() -> dict[str, Any]:
    state = model()
    state["optimizer"]["t"] = np.zeros(3, "M8[ms]")
    tied = np.zeros(5)
    state["ties"] = {"a": tied, "b": tied}
    state["rows"] = [[1, 2], [3]]
    state["empty"] = {"a": np.empty((0, 2)), "b": np.empty((0, 2))}
    return state


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_gives_a_new_roster(what):
    state, census = tied_model(), Census()
    before = census.take(state)
    CHANGES[what](state)
    after = census.take(state)
    assert described(after) == looked_at(state)
    assert after.roster is not before.roster
    assert census.take(state).roster is after.roster


KEPT: dict[str, Change] = {
    "nothing": lambda _: None,
    "bytes": lambda s: s["model"]["w0"].fill(7),
    "other memory": lambda s: s["model"].update(w0=np.zeros((2, 3), np.float32)),
    "other memory of a tie": lambda s: s["ties"].update(dict.fromkeys("ab", np.zeros(5))),
    "all other memory": lambda s: s.update(model={k: v.copy() for k, v in s["model"].items()}),
    "memory that changes hands": lambda s: s["model"].update(
        w0=s["model"]["w1"], w1=s["model"]["w0"]
    ),
    "a value": lambda s: s.update(lr=0.2),
    "a value's type": lambda s: s.update(lr=1, tied=np.float32(2)),
    "who may write": lambda s: s["model"]["w0"].setflags(write=False),
}


@pytest.mark.parametrize("what", KEPT)
def test_a_change_of_values_or_memory_alone_keeps_the_roster(what):
    state, census = tied_model(), Census()
    before = census.take(state)
    KEPT[what](state)
    for _ in range(2):
        after = census.take(state)
        assert after.roster is before.roster
        assert described(after) == looked_at(state)
        assert all(same(*pair) for pair in zip(elements(after), after.owners, strict=True))


def test_an_inventory_is_of_one_moment_and_so_are_its_values():
    state, census = tied_model(), Census()
    first = census.take(state)
    described_first = described(first)
    state["lr"], state["model"]["w0"] = "no number", np.ones((2, 3), np.float32)
    second = census.take(state)
    assert second.roster is first.roster
    assert described(first) == described_first
    assert described(second) == looked_at(state)
    assert first.structure["dict"][0][1] is second.structure["dict"][0][1]  # as large as they are
    with pytest.raises(ValueError, match="read-only"):
        second.addresses[0] = 0


def test_by_device_and_nbytes_are_those_of_the_specs():
    inventory = take_inventory(model())
    assert inventory.by_device() == {"cpu": list(range(9))}
    assert inventory.nbytes == 3 * 24 + 6 * 32
    assert take_inventory({"a": 1}).by_device() == {}


# Objects


def test_an_object_is_asked_once_at_each_look_also_when_the_state_has_changed():
    box = Box({"a": np.zeros(3), "b": 1})
    state, census = {"box": box, "twice": [box]}, Census()
    for round_, change in enumerate(("", "", "late", "")):
        if change:  # found out only after the objects have been asked
            box.items["a"] = np.zeros((3, 1))
        inventory = census.take(state)
        assert box.asked == 2 * (round_ + 1)
    assert inventory.specs[0].shape == (3, 1)


def test_an_object_with_other_things_inside_is_seen_as_it_is():
    box, census = Box({"a": np.zeros(3)}), Census()
    for items in ({"a": np.zeros(3)}, {"b": np.zeros(3)}, {"b": {"c": np.zeros(3)}}, {}):
        box.items = items
        assert described(census.take([box])) == looked_at([box])


# What can't be saved


BAD: dict[str, Change] = {
    "an object array": lambda s: s["model"].update(w0=np.array([None])),
    "its dtype": lambda s: s["model"].update(w0=s["model"]["w0"].view([("a", "f4")])),
    "a value": lambda s: s.update(lr=object()),
    "a value of an unknown type": lambda s: s.update(lr=np.zeros((), [("a", "i4")])[()]),
    "a key": lambda s: s.setdefault("odd", {}).update({Box: 1}),
    "itself": lambda s: s.update(lr=s),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cant_be_saved_is_refused_with_its_reason_though_it_was_seen_before(what):
    state, census = model(), Census()
    before = census.take(state)
    BAD[what](state)
    with pytest.raises(UnsupportedError) as fresh:
        take_inventory(state)
    for _ in range(2):
        with pytest.raises(UnsupportedError) as again:
            census.take(state)
        assert str(again.value) == str(fresh.value)
    assert census.take(model()).roster is before.roster


def test_a_thing_that_only_says_it_is_a_container_is_believed_each_time():
    class Pose(Interface):
        shown: type = dict

        @property  # type: ignore[misc]
        def __class__(self):
            return self.shown

        def items(self):
            return {"inside": np.zeros(2)}.items()

    pose, census = Pose(np.zeros(3)), Census()
    assert [spec.name for spec in census.take({"a": pose}).specs] == ["a.inside"]
    assert [spec.name for spec in census.take({"a": pose}).specs] == ["a.inside"]
    pose.shown = Pose
    assert [spec.name for spec in census.take({"a": pose}).specs] == ["a"]
    pose.shown = dict
    assert [spec.name for spec in census.take({"a": pose}).specs] == ["a.inside"]


# References


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    "dress", [lambda array: array, Interface, lambda a: a.view(Subclass), like_torch.DLPackOnly]
)
def test_nothing_of_a_state_is_held_between_two_looks(dress):
    census = Census()
    for _ in range(3):
        leaves = [dress(np.zeros(5)), dress(np.zeros((0, 2)))]
        state = {"a": leaves[0], "b": [leaves[0], Box({"c": leaves[1]})]}
        references = [weakref.ref(leaf) for leaf in leaves]
        inventory = census.take(state)
        del state, leaves
        assert inventory.specs[0].shape == (5,)
        del inventory
        assert [reference() for reference in references] == [None, None]


@pytest.mark.usefixtures("no_collector")
def test_an_inventory_keeps_the_memory_whatever_becomes_of_the_state():
    state, census = model(), Census()
    for _ in range(2):
        inventory = census.take(state)
        state["model"]["w1"] = state["model"]["w1"] + 0
        assert elements(inventory)[1].tolist() == [[1.0] * 3] * 2


# A library whose tensors can be given other memory, and hand out views that lie


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    library = like_torch.module()
    monkeypatch.setitem(sys.modules, "torch", library)
    return library


def parameters(torch: Any) -> dict[str, Any]:
    whole = np.arange(6, dtype=np.float32)
    return {
        "w": torch.nn.Parameter(whole.reshape(2, 3)),
        "t": torch.Tensor(whole.reshape(2, 3).T.copy().T),
        "c": torch.Tensor(np.zeros(4, np.complex64)),
        "e": torch.Tensor(np.zeros((0, 2), np.float32)),
    }


def test_tensors_are_seen_as_they_are_and_the_roster_stays(torch):
    state, census = parameters(torch), Census()
    first, second = census.take(state), census.take(state)
    assert second.roster is first.roster
    assert [spec.kind for spec in second.specs] == ["torch"] * 4
    assert described(first) == described(second) == looked_at(state)
    assert census.take(parameters(torch)).roster is first.roster


def test_a_tensor_that_is_given_other_memory_is_seen_there_and_the_old_memory_is_kept(torch):
    state, census = parameters(torch), Census()
    for inventory in (census.take(state), census.take(state)):
        old = elements(inventory)[0].copy()
        state["w"].data = torch.Tensor(old + 1)
        assert same(elements(inventory)[0], old)
        assert all(isinstance(owner, like_torch.Storage) for owner in inventory.owners)
        assert described(census.take(state)) == looked_at(state)


@pytest.mark.parametrize(
    "change",
    [
        lambda s, t: setattr(s["w"], "data", t.Tensor(np.zeros((3, 2), np.float32))),
        lambda s, t: setattr(s["w"], "data", t.Tensor(np.zeros((2, 3), np.int32))),
        lambda s, t: setattr(s["w"], "data", t.Tensor(np.zeros((3, 2), np.float32).T)),
        lambda s, t: s.update(w=t.Tensor(s["w"].numpy())),
        lambda s, t: s.update(t=s["w"]),
    ],
)
def test_a_tensor_that_is_given_another_layout_is_noticed(torch, change):
    state, census = parameters(torch), Census()
    before = census.take(state)
    change(state, torch)
    after = census.take(state)
    assert after.roster is not before.roster
    assert described(after) == looked_at(state)


@pytest.mark.parametrize("view", ["conjugate", "negative"])
@pytest.mark.parametrize("name", ["w", "c"])
def test_a_tensor_whose_elements_arent_what_lies_there_is_refused(torch, view, name):
    state, census = parameters(torch), Census()
    census.take(state)
    setattr(state[name], view, True)
    if view == "conjugate" and name == "w":
        return  # there is no such tensor
    for take in (census.take, take_inventory):
        with pytest.raises(UnsupportedError, match=name):
            take(state)


def test_a_tensor_on_a_device_that_isnt_one_of_ours_is_refused_though_its_address_fits(torch):
    state, census = parameters(torch), Census()
    census.take(state)
    state["w"].device = "xpu:0"
    with pytest.raises(UnsupportedError):
        census.take(state)


def test_a_tie_of_tensors_is_noticed_by_their_memory(torch):
    array: npt.NDArray[Any] = np.zeros(4, np.float32)
    one, census = {"a": torch.Tensor(array), "b": torch.Tensor(array)}, Census()
    assert len(census.take(one).specs) == 1
    one["b"].data = torch.Tensor(array.copy())
    assert len(census.take(one).specs) == 2
    assert described(census.take(one)) == looked_at(one)
