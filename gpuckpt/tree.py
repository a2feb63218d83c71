"""The state as a tree: its structure as JSON, its leaves as a list.

A node of the structure is a JSON object with one key: `dict`, `list`, `tuple`,
`object` (something with `state_dict`), `tensor` (a number), `value` or `rank`
(an object that each rank has of its own).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpuckpt.errors import UnsupportedError
from gpuckpt.names import names_of, plain_name
from gpuckpt.record import record
from gpuckpt.structure import DEPTH_LIMIT, Path
from gpuckpt.values import Json, NotPlainError, encode_value


@record(frozen=True, slots=True)
class Leaf:
    """A leaf of a state: its path, what is there, and its node of the structure, to be filled."""

    path: Path
    leaf: Any
    node: dict[str, Json]


@dataclass(frozen=True, slots=True)
class Level:
    """All that lies equally deep in a state, in the order in which `flatten` comes by.

    `nodes` are containers, objects and leaves; `leaves` has the leaves'
    positions among all of the state.  `lengths` and `keys` are those of the
    containers: how many nodes of the next level each has, and the keys of all
    mappings one after the other.
    """

    nodes: list[Any] = field(default_factory=list)
    leaves: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    keys: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Flat:
    """A state taken apart.

    `opened` has what each object's `state_dict` gave, by the object's path:
    it is asked once, since it may answer with copies.
    """

    structure: Json
    leaves: list[Leaf]
    opened: dict[Path, Any]
    levels: list[Level]

    @property
    def names(self) -> list[str]:
        """The leaves' names, in their order."""
        return names_of([leaf.path for leaf in self.leaves])


def flatten(state: Any, asked: Sequence[tuple[Any, Any]] = ()) -> Flat:
    """Take `state` apart into its structure and its leaves, objects by their `state_dict`.

    `asked` has objects that were asked already, each with its answer.

    Raises:
        UnsupportedError: a container that contains itself or is nested too
            deep, or a key that can't be saved.
    """
    walk = _Walk(asked)
    return Flat(walk.node(state, (), ()), walk.found, walk.opened, walk.levels)


class _Walk:
    """A walk through a state, and what it has come across.

    Not nested functions: these would refer to themselves, and keep arrays
    alive until Python's cyclic collector comes by.
    """

    def __init__(self, asked: Sequence[tuple[Any, Any]]) -> None:
        self.found: list[Leaf] = []
        self.opened: dict[Path, Any] = {}
        self.levels: list[Level] = []
        self._asked: dict[int, list[Any]] = {}
        self._in_own = False  # within what is this rank's own
        for node, answer in asked:
            self._asked.setdefault(id(node), []).append(answer)

    def node(self, node: Any, path: Path, above: tuple[int, ...]) -> Json:
        if not is_object(node) and not isinstance(node, Mapping | list | tuple):
            return self._leaf(node, path, len(above))
        if id(node) in above:
            raise UnsupportedError(plain_name(path), "a container that contains itself")
        if len(above) >= DEPTH_LIMIT:
            raise UnsupportedError(plain_name(path), f"nested deeper than {DEPTH_LIMIT} levels")
        level = self._level(len(above))
        level.nodes.append(node)
        above = (*above, id(node))
        if is_object(node):
            level.lengths.append(1)
            return self._object(node, path, above)
        if isinstance(node, Mapping):
            items = list(node.items())
            level.lengths.append(len(items))
            level.keys.extend(key for key, _ in items)
            return {"dict": [[_key(k, path), self.node(v, (*path, k), above)] for k, v in items]}
        children = list(node)
        level.lengths.append(len(children))
        kind = "tuple" if isinstance(node, tuple) else "list"
        return {kind: [self.node(child, (*path, at), above) for at, child in enumerate(children)]}

    def _object(self, node: Any, path: Path, above: tuple[int, ...]) -> Json:
        outer, own = self._in_own, self._in_own or is_per_rank(node)
        self._in_own = own
        self.opened[path] = inner = self._ask(node)
        found: Json = {"object": self.node(inner, path, above)}
        self._in_own = outer
        return {"rank": found} if own and not outer else found

    def _leaf(self, node: Any, path: Path, depth: int) -> Json:
        level = self._level(depth)
        level.nodes.append(node)
        level.leaves.append(len(self.found))
        self.found.append(Leaf(path, node, {}))
        return self.found[-1].node

    def _level(self, depth: int) -> Level:
        if depth == len(self.levels):
            self.levels.append(Level())
        return self.levels[depth]

    def _ask(self, node: Any) -> Any:
        answers = self._asked.get(id(node))
        return answers.pop(0) if answers else node.state_dict()


def is_object(node: object) -> bool:
    """Whether `node` keeps its own state behind `state_dict` and `load_state_dict`."""
    return has_state(type(node))


def is_per_rank(node: object) -> bool:
    """Whether an object says of its class that each rank has one of its own."""
    return getattr(type(node), "per_rank", False) is True


def has_state(kind: type) -> bool:
    """Whether objects of this type do."""
    return callable(getattr(kind, "state_dict", None)) and callable(
        getattr(kind, "load_state_dict", None)
    )


def _key(key: object, path: Path) -> Json:
    try:
        return encode_value(key)
    except NotPlainError as error:
        reason = f"its key {key!r} is {error}, which can't be saved as a key"
        raise UnsupportedError(plain_name(path), reason) from None


def rebuild(node: Any, new: Callable[[Path, Any], Any], opened: dict[Path, Any]) -> Any:
    """`node` with each leaf replaced by what `new` makes of its path and itself.

    Containers stay what they are: dicts and lists are changed in place, and
    objects are given their state back through `load_state_dict`, inner ones
    first; a tuple is made anew only if something in it was replaced.  For an
    object, `new` is asked first, and may answer with its whole state.
    """
    return _Rebuild(new, opened).node(node, ())


class _Rebuild:
    """A walk through a state that replaces what it is told to."""

    def __init__(self, new: Callable[[Path, Any], Any], opened: dict[Path, Any]) -> None:
        self._new, self._opened = new, opened

    def node(self, node: Any, path: Path) -> Any:
        if path in self._opened and is_object(node):
            whole = self._new(path, node)
            if whole is node:
                whole = self.node(self._opened[path], path)
            else:
                self._load_inner(whole, path)
            node.load_state_dict(whole)
            return node
        if is_object(node):
            return node
        if isinstance(node, Mapping):
            return _put(node, {key: self.node(child, (*path, key)) for key, child in node.items()})
        if isinstance(node, list | tuple):
            items = [self.node(child, (*path, at)) for at, child in enumerate(node)]
            return _put_items(node, items)
        return self._new(path, node)

    def _load_inner(self, node: Any, path: Path) -> None:
        """Give their state back to objects within an object's whole state."""
        if path in self._opened and is_object(node):
            self.node(node, path)
        elif isinstance(node, Mapping | list | tuple):
            items = node.items() if isinstance(node, Mapping) else enumerate(node)
            for key, child in items:
                self._load_inner(child, (*path, key))


def _put(node: Any, items: dict[Any, Any]) -> Any:
    changed = {key: item for key, item in items.items() if item is not node[key]}
    if changed and not hasattr(type(node), "__setitem__"):
        return type(node)({**node, **changed})
    for key, item in changed.items():
        node[key] = item
    return node


def _put_items(node: Any, items: list[Any]) -> Any:
    if all(item is child for item, child in zip(items, node, strict=True)):
        return node
    if isinstance(node, list):
        node[:] = items
        return node
    return type(node)(*items) if hasattr(node, "_fields") else tuple(items)
