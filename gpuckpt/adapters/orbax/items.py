"""A step's items: as a state that is saved, and made of what a step has."""

from __future__ import annotations

import json
from typing import Any

import jax

from gpuckpt.adapters.jax.leaves import is_array
from gpuckpt.adapters.jax.packing import Packed
from gpuckpt.adapters.orbax.args import Composite
from gpuckpt.errors import InvalidError, UnsupportedError

# Orbax's name for the item of those who name none.
DEFAULT = "default"
_TREES = ("Standard", "PyTree", "Array", "JaxRandomKey")
_ADVICE = "save a pytree as StandardSave, and anything else as JsonSave"


def is_composite(args: Any) -> bool:
    """Whether these are several items by name: ours, or Orbax's."""
    return isinstance(args, Composite) or type(args).__name__ == "CompositeArgs"


def state_of(args: Any) -> dict[str, Any]:
    """What is saved for the args of a save, which needn't be ours.

    Raises:
        UnsupportedError: they are of a kind that isn't known here.
        InvalidError: there are none.
    """
    if args is None:
        raise InvalidError("give save what to save as args=StandardSave(tree)")
    given = dict(args.items()) if is_composite(args) else {DEFAULT: args}
    for name in given:
        if name.startswith("__"):
            raise InvalidError(f"an item can't be called {name!r}")
    return {name: _saved(one, name) for name, one in given.items()}


def kind_of(args: Any, purpose: str) -> str:
    """What some args are about: `Standard`, `Json`, …; None counts as `Any`.

    Raises:
        UnsupportedError: they are of a kind that isn't known here.
    """
    if args is None:
        return "Any"
    name = type(args).__name__.removesuffix("Args")
    kind = name.removesuffix(purpose)
    if not name.endswith(purpose) or kind not in (*_TREES, "Json"):
        raise UnsupportedError(type(args).__name__, f"isn't known to gpuckpt; {_ADVICE}")
    return kind


def target_of(args: Any, name: str) -> tuple[Any, bool]:
    """The tree that is wanted, None for any, and whether it has to fit exactly.

    Raises:
        UnsupportedError: they ask for transformations.
    """
    if getattr(args, "transforms", None) or getattr(args, "legacy_transform_fn", None):
        raise UnsupportedError(
            name, "transforms aren't supported; restore the tree, and change it then"
        )
    item = getattr(args, "item", None)
    strict = getattr(args, "strict", True) and not getattr(args, "partial_restore", False)
    if getattr(args, "restore_args", None) is not None:
        if item is None:
            raise UnsupportedError(name, "restore_args without an item; give the abstract tree")
        item = jax.tree.map(_placed, item, args.restore_args)
    if any(leaf is ... for leaf in jax.tree.leaves(item)):
        raise UnsupportedError(
            name, "`...` isn't supported; leave such leaves out, with partial_restore=True"
        )
    return item, bool(strict)


def from_json(text: Any, name: str) -> Any:
    """What was saved as JSON.

    Raises:
        UnsupportedError: it was saved as a tree.
    """
    if not isinstance(text, str):
        raise UnsupportedError(name, "was saved as a pytree; restore it by StandardRestore")
    return json.loads(text)


def as_json(value: Any, name: str) -> str:
    """A value as JSON.

    Raises:
        UnsupportedError: it can't be written.
    """
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise UnsupportedError(name, f"can't be written as JSON ({error})") from error


def _saved(args: Any, name: str) -> Any:
    kind = kind_of(args, "Save")
    if kind == "Any":
        raise InvalidError(f"{name}: give what to save, as StandardSave(tree)")
    if kind == "Json":
        return as_json(args.item, name)
    if getattr(args, "save_args", None) is not None:
        raise UnsupportedError(name, "save_args aren't supported; cast the tree before it is saved")
    return Packed(args.item)


def _placed(leaf: Any, how: Any) -> Any:
    """A leaf with the sharding that its restore_args want."""
    sharding, dtype = getattr(how, "sharding", None), getattr(how, "dtype", None)
    if dtype is not None and is_array(leaf) and dtype != leaf.dtype:
        raise UnsupportedError("restore_args", f"{leaf.dtype} isn't cast to {dtype}; cast it after")
    if sharding is None or not is_array(leaf):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
