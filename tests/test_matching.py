"""Restoring into a state that is there: in place, by name, or not at all."""

from __future__ import annotations

import copy
import random
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.stores.memory import MemoryStore
from gpuckpt.tree import flatten
from tests.strategies import Array, arrays, keys, plain_values, same


class Pair(NamedTuple):
    left: Any
    right: Any


def saved(state: Any, **options: Any) -> MemoryStore:
    store = MemoryStore()
    gpuckpt.save("unused", state, 5, store=store, **options)
    return store


def restore(store: MemoryStore, state: Any, **options: Any) -> int:
    with gpuckpt.Checkpointer("unused", store=store) as ckpt:
        return ckpt.restore(state, **options)


def zeroed(state: Any) -> Any:
    """A state of the same structure, shapes and types, with nothing of the other's in it."""
    if isinstance(state, np.ndarray):
        return np.zeros_like(state)
    if isinstance(state, dict):
        return {key: zeroed(child) for key, child in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(zeroed(child) for child in state)
    return "not yet"


# In place


_TREES = st.dictionaries(
    keys(),
    st.recursive(
        st.one_of(arrays(), plain_values()),
        lambda inner: st.one_of(
            st.dictionaries(keys(), inner, max_size=3),
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
        ),
        max_leaves=6,
    ),
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(_TREES)
def test_a_state_is_restored_in_place_bit_for_bit(state):
    target = zeroed(state)
    before = flatten(target).leaves
    assert restore(saved(state), target) == 5
    assert same(target, state)
    for old, new in zip(before, flatten(target).leaves, strict=True):
        if isinstance(old.leaf, np.ndarray):
            assert new.leaf is old.leaf


@settings(max_examples=40, deadline=None)
@given(arrays(), st.permutations(range(4)))
def test_an_array_keeps_its_memory_order_and_address(array, order):
    axes = [axis for axis in order if axis < array.ndim]
    room = np.zeros([array.shape[axis] for axis in axes], array.dtype)
    target = room.transpose(np.argsort(axes).tolist())
    address, strides = target.ctypes.data, target.strides
    state = {"a": target}
    restore(saved({"a": array}), state)
    assert state["a"] is target
    assert (target.ctypes.data, target.strides) == (address, strides)
    assert same(target, array)


def test_views_of_a_larger_array_are_filled_and_what_lies_between_them_is_not_touched():
    room = np.full((10, 10), -1.0)
    restore(saved({"a": np.arange(15.0).reshape(5, 3)}), {"a": room[::2, 1:7:2]})
    assert same(room[::2, 1:7:2].copy(), np.arange(15.0).reshape(5, 3))
    room[::2, 1:7:2] = -1
    assert (room == -1).all()


def test_tuples_and_named_tuples_are_made_anew_only_where_something_in_them_is():
    state = {"t": (1, np.ones(2)), "p": Pair(np.ones(1), "x"), "arrays": (np.ones(3),)}
    target: dict[str, Any] = {
        "t": (0, np.zeros(2)),
        "p": Pair(np.zeros(1), ""),
        "arrays": (np.zeros(3),),
    }
    old = dict(target)
    restore(saved(state), target)
    assert same(target, state)
    assert type(target["p"]) is Pair
    assert target["p"].left is old["p"].left
    assert target["arrays"] is old["arrays"]


def test_a_read_only_array_is_replaced_and_itself_left_as_it_was():
    frozen = np.zeros(3)
    frozen.flags.writeable = False
    target = {"a": frozen, "in": (frozen,)}
    restore(saved({"a": np.ones(3), "in": (np.full(3, 2.0),)}), target)
    assert same(target, {"a": np.ones(3), "in": (np.full(3, 2.0),)})
    assert (frozen == 0).all()


def test_a_read_only_mapping_is_made_anew_and_its_arrays_are_not():
    array = np.zeros(2)
    target: dict[str, Any] = {"m": MappingProxyType({"a": array, "lr": 0.0})}
    restore(saved({"m": {"a": np.ones(2), "lr": 0.5}}), target)
    assert isinstance(target["m"], MappingProxyType)
    assert target["m"]["a"] is array
    assert same(dict(target["m"]), {"a": np.ones(2), "lr": 0.5})


def test_a_place_that_holds_none_gets_a_new_array():
    target: dict[str, Any] = {"a": None, "b": 1}
    restore(saved({"a": np.ones((2, 3)), "b": None}), target)
    assert same(target, {"a": np.ones((2, 3)), "b": None})


def test_a_single_array_is_restored_and_a_single_value_has_no_place_to_go():
    target = np.zeros(3)
    restore(saved(np.ones(3)), target)
    assert same(target, np.ones(3))
    with pytest.raises(gpuckpt.InvalidError, match="in place"):
        restore(saved((1, 2)), (0, 0))


@pytest.mark.parametrize(
    "wrap", [lambda *two: two, lambda a, b: MappingProxyType({"a": a, "b": b})]
)
def test_a_state_that_cannot_be_changed_in_place_is_refused_before_anything_is(wrap):
    array = np.zeros(2)
    with pytest.raises(gpuckpt.InvalidError, match="in place"):
        restore(saved(wrap({"w": np.ones(2)}, 1)), wrap({"w": array}, 0))
    assert (array == 0).all()
    target = wrap({"w": array, "n": 0}, np.zeros(3))
    restore(saved(wrap({"w": np.ones(2), "n": 1}, np.ones(3))), target)
    assert (array == 1).all()


# One array under several names


def test_ties_in_the_target_are_filled_once_if_the_checkpoint_has_them_too():
    tied = np.arange(6.0)
    target = dict.fromkeys(("a", "b"), np.zeros(6))
    restore(saved({"a": tied, "b": tied}), target)
    assert target["a"] is target["b"]
    assert same(target["a"], tied)
    restore(saved({"a": tied + 1, "b": tied + 1}), target)  # equal, though two arrays
    assert same(target["a"], tied + 1)


def test_a_tie_in_the_checkpoint_fills_both_arrays_of_the_target():
    tied = np.arange(6.0)
    target = {"a": np.zeros(6), "b": np.zeros(6)}
    restore(saved({"a": tied, "b": tied}), target)
    assert target["a"] is not target["b"]
    assert same(target, {"a": tied, "b": tied})


def test_a_tie_of_what_was_two_different_arrays_is_a_mismatch():
    store = saved({"a": np.zeros(6), "b": np.ones(6)})
    target = dict.fromkeys(("a", "b"), np.full(6, 7.0))
    with pytest.raises(gpuckpt.MismatchError, match="one array with a here, two different"):
        restore(store, target)
    assert (target["a"] == 7).all()
    restore(store, target, strict=False)
    assert (target["a"] == 0).all()  # b is the one that doesn't fit, and keeps out of it


# Objects


class Views:
    """Like a torch module: tells its own arrays, and copies into them."""

    def __init__(self, **arrays: Any) -> None:
        self.arrays = arrays
        self.loaded = 0

    def state_dict(self) -> dict[str, Any]:
        return dict(self.arrays)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.keys() != self.arrays.keys():
            raise KeyError(*(state.keys() ^ self.arrays.keys()))
        for name, value in state.items():
            if isinstance(value, np.ndarray):
                self.arrays[name][...] = value
            else:
                self.arrays[name] = value
        self.loaded += 1


class Copies(Views):
    """Answers with copies of everything."""

    def state_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.arrays)


class Lazy:
    """Like an optimizer: has no state before its first step."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state, "groups": [{"lr": 0.1}]} if self.state else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state.get("state", {})


@pytest.mark.parametrize("kind", [Views, Copies])
def test_an_object_gets_its_state_back(kind):
    one = kind(w=np.arange(4.0), n=3)
    other = kind(w=np.zeros(4), n=0)
    array = other.arrays["w"]
    restore(saved({"model": one}), {"model": other})
    assert same(other.arrays, one.arrays)
    assert other.arrays["w"] is array
    assert other.loaded == 1


def test_a_fresh_object_gets_state_that_it_did_not_have_yet():
    one = Lazy(m=np.arange(3.0), step=9, nested={"v": [np.ones(2)]})
    state = {"optimizer": Lazy()}
    restore(saved({"optimizer": one}), state)
    assert same(state["optimizer"].state, one.state)


def test_an_object_that_was_saved_as_a_dict_gets_it():
    state = {"model": Views(w=np.zeros(2))}
    restore(saved({"model": {"w": np.ones(2)}}), state)
    assert same(state["model"].arrays, {"w": np.ones(2)})


class Trainer:
    """An object whose state has objects in it, and that takes back what it gave."""

    def __init__(self, model: Any, optimizer: Any, step: int) -> None:
        self.model, self.optimizer, self.step = model, optimizer, step

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [self.model, (self.optimizer,)], "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model, (self.optimizer,) = state["parts"]
        self.step = state["step"]


def test_objects_within_an_object_get_their_states_first_and_stay_themselves():
    model, optimizer = Views(w=np.zeros(4)), Lazy()
    array, trainer = model.arrays["w"], Trainer(model, optimizer, 0)
    one = Trainer(Views(w=np.arange(4.0)), Lazy(m=np.ones(2)), 6)
    restore(saved({"trainer": one}), {"trainer": trainer})
    assert trainer.model is model
    assert trainer.optimizer is optimizer
    assert model.arrays["w"] is array
    assert same(model.arrays, {"w": np.arange(4.0)})
    assert same(optimizer.state, {"m": np.ones(2)})
    assert trainer.step == 6


def test_what_an_object_refuses_is_a_mismatch_that_says_why():
    with pytest.raises(gpuckpt.MismatchError, match=r"load_state_dict refused .*KeyError.*extra"):
        restore(saved({"m": Views(w=np.ones(2), extra=1)}), {"m": Views(w=np.zeros(2))})


def test_an_objects_array_of_another_shape_is_a_mismatch_and_keeps_its_value_if_not_strict():
    store = saved({"m": Views(w=np.ones((2, 3)), b=np.ones(2)), "lr": 0.5})
    state: dict[str, Any] = {"m": Views(w=np.full(4, 7.0), b=np.zeros(2)), "lr": 0.0}
    with pytest.raises(gpuckpt.MismatchError, match=r"m\.w: float64\[4\] here, float64\[2, 3\]"):
        restore(store, state)
    assert same(state["m"].arrays, {"w": np.full(4, 7.0), "b": np.zeros(2)})
    restore(store, state, strict=False)
    assert same(state["m"].arrays, {"w": np.full(4, 7.0), "b": np.ones(2)})
    assert state["lr"] == 0.5


def test_names_pick_leaves_of_an_object():
    model = Views(w=np.zeros(2), b=np.zeros(2))
    restore(saved({"m": Views(w=np.ones(2), b=np.ones(2))}), {"m": model}, names=["m.w"])
    assert same(model.arrays, {"w": np.ones(2), "b": np.zeros(2)})


def test_generators_draw_again_what_they_drew():
    state = {"rng": gpuckpt.RNG()}
    random.seed(1)
    np.random.seed(2)
    random.gauss(0, 1)
    np.random.standard_normal(3)
    store = saved(state)

    def draw() -> list[float]:
        pythons = [random.random(), random.gauss(0, 1)]
        return [*pythons, *np.random.standard_normal(5), *np.random.random(700)]

    wanted = draw()
    assert draw() != wanted
    restore(store, state)
    assert draw() == wanted


# Some names, other names


def model(value: float) -> dict[str, Any]:
    layers = [{"w": np.full((2, 2), value + at), "b": np.full(2, value + at)} for at in range(3)]
    return {"layers": layers, "lr": value}


@pytest.mark.parametrize(
    ("names", "picked"),
    [
        (["lr"], {"lr"}),
        ("layers.1", {"layers.1.w", "layers.1.b"}),
        (["*.w"], {"layers.0.w", "layers.1.w", "layers.2.w"}),
        (["layers.[02].b", "lr"], {"layers.0.b", "layers.2.b", "lr"}),
        ((name for name in ["layers.2.w"]), {"layers.2.w"}),
        ([], set()),
    ],
)
def test_names_pick_what_is_restored_and_all_else_stays(names, picked):
    target = model(-9.0)
    restore(saved(model(1.0)), target, names=names)
    flat = {name: leaf.leaf for name, leaf in _named(target)}
    for name, leaf in _named(model(1.0)):
        assert same(flat[name], leaf.leaf) == (name in picked)


def _named(state: Any) -> list[tuple[str, Any]]:
    flat = flatten(state)
    return list(zip(flat.names, flat.leaves, strict=True))


def test_a_name_that_fits_nothing_is_not_found_with_a_suggestion_and_changes_nothing():
    target = model(-9.0)
    with pytest.raises(gpuckpt.NotFoundError, match=r"'layers\.0\.v'.*did you mean layers\.0\.w"):
        restore(saved(model(1.0)), target, names=["lr", "layers.0.v"])
    assert same(target, model(-9.0))


def test_no_names_at_all_restore_no_object_either():
    rng = Views(w=np.zeros(2))
    restore(saved({"m": Views(w=np.ones(2))}), {"m": rng}, names=[])
    assert same(rng.arrays, {"w": np.zeros(2)})


@pytest.mark.parametrize(
    "rename",
    [
        {"encoder": "body", "encoder.head": "head", "": ""},
        {"encoder.head": "head", "encoder": "body"},
        lambda name: name.replace("encoder.head", "head").replace("encoder", "body"),
    ],
)
def test_renames_lead_from_the_checkpoints_names_to_the_states(rename):
    store = saved({"encoder": {"w": np.ones(2), "head": {"w": np.full(3, 2.0)}}, "encoders": 4})
    target = {"body": {"w": np.zeros(2)}, "head": {"w": np.zeros(3)}, "encoders": 0}
    if callable(rename):
        rename_ = rename
        rename = lambda name: name if name == "encoders" else rename_(name)  # noqa: E731
    restore(store, target, rename=rename)
    assert same(target, {"body": {"w": np.ones(2)}, "head": {"w": np.full(3, 2.0)}, "encoders": 4})


def test_a_rename_can_add_or_take_away_a_beginning():
    plain, wrapped = {"w": np.ones(2)}, {"module": {"w": np.ones(2)}}
    target = {"module": {"w": np.zeros(2)}}
    restore(saved(plain), target, rename={"": "module"})
    assert same(target, wrapped)
    other = {"w": np.zeros(2)}
    restore(saved(wrapped), other, rename={"module": ""})
    assert same(other, plain)


def test_a_rename_that_gives_one_name_to_two_is_refused():
    with pytest.raises(gpuckpt.InvalidError, match=r"two leaves.*'w'"):
        restore(saved({"a": 1, "b": 2}), {"w": 0}, rename=lambda _: "w")


# What doesn't fit


@pytest.mark.parametrize(
    ("target", "lists", "words"),
    [
        ({"a": np.zeros(3)}, ([], ["b"], []), ["unexpected in the checkpoint (1)", "+ b"]),
        (
            {"a": np.zeros(3), "b": 1, "c": 2},
            (["c"], [], []),
            ["missing from the checkpoint (1)", "- c"],
        ),
        ({"a": np.zeros(4), "b": 1}, ([], [], ["a"]), ["! a: float64[4] here, float64[3] in"]),
        ({"a": np.zeros(3, "f4"), "b": 1}, ([], [], ["a"]), ["float32[3] here, float64[3]"]),
        ({"a": np.zeros(3, ">f8"), "b": 1}, ([], [], ["a"]), [">float64[3] here, float64[3]"]),
        ({"a": 5, "b": 1}, ([], [], ["a"]), ["a plain value here (int), an array in"]),
        ({"a": np.zeros(3), "b": np.zeros(1)}, ([], [], ["b"]), ["an array here, a plain value"]),
        ({"c": np.zeros(3)}, (["c"], ["a", "b"], []), ["- c", "+ a", "+ b", "strict=False"]),
    ],
)
def test_a_mismatch_lists_every_difference_and_changes_nothing(target, lists, words):
    before = copy.deepcopy(target)
    with pytest.raises(gpuckpt.MismatchError) as caught:
        restore(saved({"a": np.ones(3), "b": 7}), target)
    error = caught.value
    found = ([*error.missing], [*error.unexpected], [s.split(":")[0] for s in error.mismatched])
    assert found == lists
    assert all(word in str(error) for word in ["step 5", *words])
    assert same(target, before)


def test_a_long_list_of_differences_is_cut_short_in_the_message_only():
    with pytest.raises(gpuckpt.MismatchError, match="… and 80 more") as caught:
        restore(saved({}), dict.fromkeys(map(str, range(100))))
    assert len(caught.value.missing) == 100


def test_without_strict_what_fits_is_restored_and_the_rest_keeps_its_value():
    target: dict[str, Any] = {"a": np.zeros(3), "b": np.full(2, 7.0), "c": "mine", "d": 0}
    store = saved({"a": np.ones(3), "b": np.ones(9), "d": 4, "e": 5})
    assert restore(store, target, strict=False) == 5
    assert same(target, {"a": np.ones(3), "b": np.full(2, 7.0), "c": "mine", "d": 4})


def test_resume_gives_zero_without_a_checkpoint_and_the_newest_step_with_one():
    store, state = MemoryStore(), {"w": np.ones(2)}
    with gpuckpt.Checkpointer("unused", store=store) as ckpt:
        assert ckpt.resume(state) == 0
        for step in (3, 11, 7):
            state["w"][:] = step
            ckpt.save(step, state).result()
        assert ckpt.resume(state) == 11
        assert same(state, {"w": np.full(2, 11.0)})
        assert ckpt.restore(state, 7) == 7
        assert same(state, {"w": np.full(2, 7.0)})


def bits(array: Array) -> bytes:
    return array.tobytes()


def test_a_damaged_chunk_never_reaches_an_array_that_is_not_filled_directly():
    array = np.arange(1000.0)
    store = saved({"a": array}, codec="raw")
    segment = next(name for name in store.files if name.endswith(".segment"))
    store.files[segment][100] ^= 1
    target = np.zeros((1000, 2))[:, 0]
    with pytest.raises(gpuckpt.CorruptError, match="a in "):
        restore(store, {"a": target})
    assert bits(target) == bits(np.zeros(1000))


def test_views_of_one_buffer_are_filled_if_the_checkpoint_agrees_and_refused_if_not(tmp_path):
    def state(buffer: np.ndarray) -> dict:
        return {"whole": buffer, "part": buffer[5:15], "odd": buffer[1::2], "even": buffer[::2]}

    gpuckpt.save(tmp_path, state(np.arange(20.0)), 1)
    separate = {name: array + len(name) for name, array in state(np.arange(20.0)).items()}
    gpuckpt.save(tmp_path, separate, 2)
    buffer = np.zeros(20)
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.restore(state(buffer), 1)
        assert buffer.tobytes() == np.arange(20.0).tobytes()
        with pytest.raises(gpuckpt.MismatchError, match="shares memory with another array"):
            ckpt.restore(state(buffer), 2)
        apart = {"odd": buffer[1::2], "even": buffer[::2]}  # share a range, but no byte
        ckpt.restore(apart, 2, names=["odd", "even"])
        assert apart["odd"].tobytes() == separate["odd"].tobytes()
        assert apart["even"].tobytes() == separate["even"].tobytes()


def test_a_broadcast_target_is_replaced_since_it_cannot_hold_different_elements(tmp_path):
    gpuckpt.save(tmp_path, {"w": np.arange(10.0)})
    target = {"w": np.lib.stride_tricks.as_strided(np.zeros(1), (10,), (0,))}
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.restore(target)
    assert target["w"].tolist() == list(range(10))


def test_many_renames_and_many_objects_find_their_counterparts(tmp_path):
    class Box:
        def __init__(self, value: float) -> None:
            self.value = np.full(2, float(value))

        def state_dict(self) -> dict:
            return {"value": self.value}

        def load_state_dict(self, state: dict) -> None:
            self.value = state["value"]

    gpuckpt.save(tmp_path, {f"l{at}": {"w": Box(at)} for at in range(1500)})
    target = {f"l{at}": {"w": Box(0)} for at in range(1500)}
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.restore(target)
        assert [box["w"].value[0] for box in target.values()] == list(range(1500))
        renamed = {f"m{at}": {"w": {"value": np.zeros(2)}} for at in range(1500)}
        ckpt.restore(renamed, rename={f"l{at}": f"m{at}" for at in range(1500)})
        assert renamed["m7"]["w"]["value"][0] == 7
