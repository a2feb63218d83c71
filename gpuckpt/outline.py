"""The containers of a state, remembered, so that a walk through the same ones is quick."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, compress
from operator import call, is_
from typing import Any, Literal

from gpuckpt.arrays import Library, Wrapping, probed, wrapping
from gpuckpt.names import key_text
from gpuckpt.tree import Flat, Level, has_state
from gpuckpt.values import NotPlainError, is_plain

Kind = Literal["object", "mapping", "sequence", "plain", "other"] | Library | Wrapping

_CONTAINERS = ("object", "mapping", "sequence")
# Their methods are known to do what they say.
_MAPPINGS = (dict, OrderedDict, defaultdict)
_SEQUENCES = (list, tuple)
# Two keys of one of these types that are equal are written alike.
_SIMPLE_KEYS = (str, int, bool, bytes, type(None))


def kind_of(kind: type) -> Kind:
    """What nodes of exactly this type are to `flatten` and to `arrays.look`."""
    if has_state(kind):
        return "object"
    if issubclass(kind, Mapping):
        return "mapping"
    if issubclass(kind, list | tuple):
        return "sequence"
    return "plain" if is_plain(kind) else probed(kind) or wrapping(kind) or "other"


class Outline:
    """The containers of a state as they were, and how to get at its leaves.

    Refers to keys and types of the state, to none of its leaves or containers.
    """

    def __init__(self, levels: Sequence[_Level], kinds: dict[type, Kind]) -> None:
        self._levels, self._kinds = levels, kinds

    @classmethod
    def of(cls, flat: Flat) -> Outline | None:
        """The outline of a state; None if its types don't tell what its nodes are."""
        types = {kind for level in flat.levels for kind in map(type, level.nodes)}
        kinds = {kind: kind_of(kind) for kind in types}
        for level in flat.levels:
            leaves = [node for node in level.nodes if kinds[type(node)] not in _CONTAINERS]
            if len(leaves) != len(level.leaves) or _poses(kinds, leaves):
                return None
        try:
            return cls([_Level.of(level, kinds) for level in flat.levels], kinds)
        except NotPlainError:
            return None

    def order(self, flat: Flat) -> dict[Kind, list[int]]:
        """By kind, the positions in `flat` of the leaves in the order of `leaves`."""
        found: dict[Kind, list[int]] = {}
        for level in flat.levels:
            kinds = [self._kinds[type(node)] for node in level.nodes]
            leaves = (kind for kind in kinds if kind not in _CONTAINERS)
            for kind, position in zip(leaves, level.leaves, strict=True):
                found.setdefault(kind, []).append(position)
        return found

    def leaves(self, state: Any, asked: list[tuple[Any, Any]]) -> dict[Kind, list[Any]] | None:
        """The leaves of a state, by kind; None if its containers aren't as they were.

        Appends to `asked` each object whose state was asked for, and the answer.
        """
        if any(kind_of(kind) != known for kind, known in self._kinds.items()):
            return None
        found: dict[Kind, list[Any]] = {}
        nodes = [state]
        for level in self._levels:
            if not level.fits(nodes):
                return None
            for kind, mask in level.leaves:
                found.setdefault(kind, []).extend(compress(nodes, mask))
            below = level.below(nodes, asked)
            if below is None:
                return None
            nodes = below
        return None if _poses(self._kinds, found.get("other", ())) else found


def _poses(kinds: Mapping[type, Kind], leaves: Sequence[Any]) -> bool:
    """Whether one of these says that it is a container, though its type doesn't (a proxy)."""
    return any(
        isinstance(leaf, Mapping | list | tuple)
        for leaf in leaves
        if kinds.get(type(leaf), "other") == "other"
    )


@dataclass(slots=True)
class _Level:
    """One level of a state: what its nodes were, and how to get at the next level's.

    `leaves` has for each kind which nodes are leaves of it, `containers` which
    are none.  Of the containers, `odd` are to be replaced before they are
    read, `mappings` have keys, and `getters` give what is inside.
    """

    types: list[type]
    leaves: list[tuple[Kind, bytes]]
    containers: bytes
    odd: list[tuple[int, bool]]
    mappings: bytes
    getters: list[Callable[[Any], Any]]
    lengths: list[int]
    keys: list[Any]
    key_types: list[type]
    key_texts: list[str] | None = field(default=None)

    @classmethod
    def of(cls, level: Level, kinds: Mapping[type, Kind]) -> _Level:
        types = list(map(type, level.nodes))
        every = [kinds[kind] for kind in types]
        inside = [kind for kind in types if kinds[kind] in _CONTAINERS]
        key_types = list(map(type, level.keys))
        simple = set(key_types).issubset(_SIMPLE_KEYS)
        return cls(
            types=types,
            leaves=[(k, _mask(every, k)) for k in dict.fromkeys(every) if k not in _CONTAINERS],
            containers=bytes(kind in _CONTAINERS for kind in every),
            odd=[
                (at, kinds[kind] == "object")
                for at, kind in enumerate(inside)
                if kind not in (*_MAPPINGS, *_SEQUENCES)
            ],
            mappings=_mask([kinds[kind] for kind in inside], "mapping"),
            getters=[_getter(kind, kinds[kind]) for kind in inside],
            lengths=level.lengths,
            keys=level.keys,
            key_types=key_types,
            key_texts=None if simple else list(map(key_text, level.keys)),
        )

    def fits(self, nodes: list[Any]) -> bool:
        """Whether these are of the same types; plain values may be of another plain type."""
        types = list(map(type, nodes))
        if types == self.types:
            return True
        if len(types) != len(self.types):
            return False
        pairs = zip(types, self.types, strict=True)
        changed = {kind for pair in pairs if pair[0] is not pair[1] for kind in pair}
        if any(kind_of(kind) != "plain" for kind in changed):
            return False
        self.types = types
        return True

    def below(self, nodes: list[Any], asked: list[tuple[Any, Any]]) -> list[Any] | None:
        """The nodes inside of these; None if the containers don't have the same keys or lengths."""
        containers = list(compress(nodes, self.containers))
        for at, is_object in self.odd:
            containers[at] = _ask(containers[at], asked) if is_object else _read(containers[at])
        if list(map(len, containers)) != self.lengths:
            return None
        keys = list(chain.from_iterable(compress(containers, self.mappings)))
        if not self._same_keys(keys):
            return None
        if len(set(self.getters)) == 1:
            return list(chain.from_iterable(map(self.getters[0], containers)))
        return list(chain.from_iterable(map(call, self.getters, containers)))

    def _same_keys(self, keys: list[Any]) -> bool:
        """As they are written: 1, 1.0 and True are equal, but not the same key."""
        if (
            self.key_texts is None
            and len(keys) == len(self.keys)
            and all(map(is_, keys, self.keys))
        ):
            return True
        if list(map(type, keys)) != self.key_types:
            return False
        if self.key_texts is None:
            return keys == self.keys
        try:
            return list(map(key_text, keys)) == self.key_texts
        except NotPlainError:
            return False


class _Items:
    """What a mapping of any type said that it holds, once."""

    def __init__(self, node: Mapping[Any, Any]) -> None:
        items = list(node.items())
        self._keys, self._values = [key for key, _ in items], [value for _, value in items]

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._keys)

    def values(self) -> list[Any]:
        """In the order of the keys."""
        return self._values


def _read(node: Any) -> _Items | list[Any]:
    return _Items(node) if isinstance(node, Mapping) else list(node)


def _ask(node: Any, asked: list[tuple[Any, Any]]) -> tuple[Any]:
    asked.append((node, node.state_dict()))
    return (asked[-1][1],)


def _getter(kind: type, is_a: Kind) -> Callable[[Any], Any]:
    """What gives the nodes inside of a container of a type, or of what replaces it."""
    if is_a != "mapping":
        return iter
    return kind.values if kind in _MAPPINGS else _Items.values


def _mask(kinds: Sequence[Kind], wanted: Kind) -> bytes:
    return bytes(kind == wanted for kind in kinds)
