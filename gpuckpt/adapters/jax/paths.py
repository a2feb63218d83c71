"""Pytrees as nested dicts, whose keys are those of JAX's paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from gpuckpt.errors import UnsupportedError
from gpuckpt.names import plain_name
from gpuckpt.structure import Path

# What a tree that is one leaf is called.
LONE: Path = ("value",)


def leaves_of(tree: Any) -> tuple[dict[Path, Any], Any]:
    """A tree's leaves by their paths, in JAX's order, and its treedef.

    A path has a dict's keys, a sequence's indices and the names of fields.

    Raises:
        UnsupportedError: two leaves would have one path.
    """
    found: dict[Path, Any] = {}
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    for entries, leaf in flat:
        path = tuple(map(_key, entries)) or LONE
        if path in found:
            raise UnsupportedError(plain_name(path), "two leaves of the tree have this path")
        found[path] = leaf
    return found, treedef


def nested(leaves: Mapping[Path, Any]) -> dict[Any, Any]:
    """Leaves as dicts within dicts: the inverse of `at`, for each path."""
    root: dict[Any, Any] = {}
    inner = {id(root)}
    for path, leaf in leaves.items():
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
            if id(node) not in inner and node:
                raise UnsupportedError(plain_name(path), "a leaf and a container have one path")
            inner.add(id(node))
        if path[-1] in node:
            raise UnsupportedError(plain_name(path), "a leaf and a container have one path")
        node[path[-1]] = leaf
    return root


def at(nest: Mapping[Any, Any], path: Path) -> Any:
    """What is at a path of nested dicts."""
    node: Any = nest
    for key in path:
        node = node[key]
    return node


def _key(entry: Any) -> Any:
    """The plain value in a path's entry; those of classes that JAX doesn't have, as text."""
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return str(entry)
