"""What frameworks keep, as what a state may hold, and back."""

from __future__ import annotations

import enum
from argparse import Namespace
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.adapters.bridge import Bridge, pack, unpack
from gpuckpt.adapters.plain import NOTES, forms_of, join, split
from gpuckpt.stores.memory import MemoryStore


class Shade(enum.Flag):
    LIGHT = 1
    DARK = 2


class Size(enum.StrEnum):
    SMALL = "s"


@dataclass(slots=True)
class Pair:
    one: object
    other: object = None


class Triple(NamedTuple):
    a: object
    b: object
    c: object


class Settings(dict):
    pass


FORMS = forms_of([Shade, Size, Pair, Triple, Settings])

KEYS = st.text(max_size=3) | st.integers(-3, 3) | st.tuples(st.integers(0, 2), st.booleans())
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
HASHABLE = PLAIN | st.sampled_from([*Shade, *Size]) | st.tuples(st.integers(), st.text(max_size=2))
LEAVES = (
    HASHABLE
    | st.binary(max_size=3)
    | st.sets(HASHABLE, max_size=3)
    | st.frozensets(HASHABLE, max_size=3)
    | st.sampled_from([Path("a/b"), Path(), np.float32(2.5)])
)


def _inner(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    by_name = st.dictionaries(st.text("abc", min_size=1, max_size=2), children, max_size=3)
    return (
        st.lists(children, max_size=3)
        | st.lists(children, max_size=3).map(tuple)
        | st.dictionaries(KEYS, children, max_size=3)
        | st.dictionaries(KEYS, children, max_size=3).map(OrderedDict)
        | st.dictionaries(KEYS, children, max_size=3).map(Settings)
        | by_name.map(lambda items: Namespace(**items))
        | by_name.map(lambda items: SimpleNamespace(**items))
        | st.builds(Pair, children, children)
        | st.builds(Triple, children, children, children)
    )


TREES = st.recursive(LEAVES, _inner, max_leaves=12)


def same(one: Any, other: Any) -> bool:
    """Equal, and of one type, all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Namespace | SimpleNamespace):
        return same(vars(one), vars(other))
    if isinstance(one, Pair):
        return same([one.one, one.other], [other.one, other.other])
    return bool(one == other)


@given(TREES)
def test_join_undoes_split(tree):
    assert same(join(*split(tree, FORMS), FORMS), tree)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.text("xyz", min_size=1, max_size=2), TREES, max_size=3))
def test_it_comes_back_from_a_checkpoint(tree):
    store = MemoryStore()
    gpuckpt.save("", pack({**tree, "array": np.arange(3)}, FORMS), store=store)

    found = unpack(gpuckpt.load("", store=store), FORMS)
    assert list(found.pop("array")) == [0, 1, 2]
    assert same(found, tree)


def test_arrays_are_passed_on_and_not_copied():
    array = np.ones(3)

    plain, notes = split({"a": [array]}, FORMS)
    assert plain["a"][0] is array
    assert notes == []


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        ({"a": [1, object()]}, "a.1"),
        ({"a": {object(): 1}}, "a"),
        ({"a": {"b": type}}, "a.b"),
        ({"a": Shade.LIGHT | Shade.DARK}, "a"),
        ({"a": type("Str", (str,), {})("x")}, "a"),
    ],
)
def test_what_has_no_form_is_refused_by_its_path(thing, name):
    with pytest.raises(gpuckpt.UnsupportedError) as caught:
        split(thing, FORMS)
    assert caught.value.name == name


def test_a_tree_that_contains_itself_is_refused():
    tree: dict[str, object] = {}
    tree["a"] = tree

    with pytest.raises(gpuckpt.UnsupportedError, match="nested deeper"):
        split(tree, FORMS)


@pytest.mark.parametrize("kind", [int, object, type("Other", (), {})])
def test_classes_that_cannot_be_made_again_are_no_types(kind):
    with pytest.raises(gpuckpt.InvalidError, match="types"):
        forms_of([kind])


@pytest.mark.parametrize(
    "notes",
    [[[("a",), "set", None]], [[("a",), f"{__name__}.Pair", None]], [[("a",), "path", None]]],
)
def test_notes_that_do_not_fit_are_a_formats_fault(notes):
    with pytest.raises(gpuckpt.CheckpointError):
        join({"a": 3}, notes, FORMS)


def test_names_that_are_taken_are_refused():
    with pytest.raises(gpuckpt.InvalidError, match=NOTES):
        pack({NOTES: 1}, FORMS)


def test_a_bridge_is_asked_only_when_it_is_saved():
    asked = []

    def dump():
        asked.append(1)
        return {"set": {1}}

    bridge, store = Bridge(dump, lambda: {"mine": 2}, dict, FORMS), MemoryStore()
    with gpuckpt.Checkpointer("", store=store, every=gpuckpt.Every(steps=3)) as saver:
        for step in range(1, 5):
            saver.step(step, bridge)
        assert len(asked) == 1
        saver.wait()
        assert bridge.restored_by(saver.resume) == 3
        assert len(asked) == 1
    assert (bridge.loaded, bridge.loaded_own) == ({"set": {1}}, {"mine": 2})
    bridge.forget()
    assert bridge.loaded == {}


def test_a_restore_fills_what_is_live_and_makes_the_rest_anew():
    weights, other = np.zeros(3), np.zeros(2)
    tree = {"model": {"w": weights}, "other": other}
    bridge = Bridge(lambda: tree, dict, lambda: {"model": {"w": weights}}, FORMS)
    store = MemoryStore()
    gpuckpt.save("", bridge, 1, store=store)
    weights += 5
    tree["other"] = np.zeros(9)
    with gpuckpt.Checkpointer("", store=store) as saver:
        bridge.restored_by(saver.resume)

    assert bridge.loaded["model"]["w"] is weights
    assert list(weights) == [0, 0, 0]
    assert bridge.loaded["other"].shape == (2,)
