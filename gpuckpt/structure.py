"""A state's structure as JSON: walked, joined, and made into containers again.

A node is a JSON object with one key: `dict`, `list`, `tuple`, `object`
(something with `state_dict`), `tensor` (a number), `value`, `rank` (what each
rank has of its own, in the structure of one of them) or `ranks` (the same, of
all of them, by rank).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gpuckpt.errors import FormatError
from gpuckpt.values import Json, decode_value

DEPTH_LIMIT = 100

Path = tuple[Any, ...]

# In one rank's structure, a place in a list of which another rank may have something.
NOBODYS: Json = {"ranks": []}

_PAYLOADS: dict[str, type] = {
    "dict": list,
    "list": list,
    "tuple": list,
    "object": dict,
    "tensor": int,
    "rank": dict,
    "ranks": list,
}


@dataclass(frozen=True, slots=True)
class Mark:
    """A tensor's place in a state that is being rebuilt: `tensor` is its number."""

    tensor: int


def walk_json(structure: Json) -> Iterator[tuple[Path, Json]]:
    """Every leaf of a structure with its path, in `flatten`'s order."""
    yield from _walk_json(structure, (), 0)


def _walk_json(node: Json, path: Path, depth: int) -> Iterator[tuple[Path, Json]]:
    kind, payload = split_node(node, depth)
    if kind in ("tensor", "value"):
        yield path, node
        return
    for keys, child in _inside(kind, payload):
        if depth < 2 * DEPTH_LIMIT and _is_leaf(child):  # mostly
            yield (*path, *keys), child
        else:
            yield from _walk_json(child, (*path, *keys), depth + 1)


def _is_leaf(node: Json) -> bool:
    """Whether a node surely is a leaf; of what isn't as it should be, it is never said."""
    return (
        type(node) is dict
        and len(node) == 1
        and (type(node.get("tensor")) is int or "value" in node)
    )


def nodes_at(structure: Json, paths: Collection[Path]) -> dict[Path, Json]:
    """The outermost node of a structure at each of `paths` that there is."""
    found: dict[Path, Json] = {}
    if not paths:
        return found
    _nodes_at(structure, (), frozenset(paths), found, 0)
    return found


def _nodes_at(
    node: Json, path: Path, paths: frozenset[Path], found: dict[Path, Json], depth: int
) -> None:
    kind, payload = split_node(node, depth)
    if path in paths:
        found.setdefault(path, node)
    for keys, child in _inside(kind, payload):
        _nodes_at(child, (*path, *keys), paths, found, depth + 1)


def split_node(node: Json, depth: int) -> tuple[str, Any]:
    """The kind and the contents of a node, checked."""
    if not isinstance(node, dict) or len(node) != 1 or depth > 2 * DEPTH_LIMIT:
        raise FormatError(f"not a node of a state's structure: {str(node)[:80]}")
    ((kind, payload),) = node.items()
    if kind != "value" and not isinstance(payload, _PAYLOADS.get(kind, ())):
        raise FormatError(f"a node of a state's structure can't be {kind!r} here")
    return kind, payload


def _inside(kind: str, payload: Any) -> Iterator[tuple[Path, Json]]:
    """The nodes inside of one, each with what it adds to the path."""
    if kind in ("object", "rank"):
        yield (), payload
    elif kind == "dict":
        for key, child in _items(payload):
            yield (key,), child
    elif kind in ("list", "tuple"):
        for at, child in enumerate(payload):
            yield (at,), child
    elif kind == "ranks":
        for rank, child in _ranks(payload).items():
            yield (f"@{rank}",), child


def _items(payload: list[Json]) -> list[tuple[Any, Json]]:
    """A dict's keys and nodes, checked: no key is there twice."""
    items = [(key if type(key) is str else decode_value(key), child) for key, child in payload]
    try:
        count = len(dict(items))
    except TypeError as error:
        raise FormatError(f"a key of a state's structure can't be one ({error})") from None
    if count < len(items):
        raise FormatError("a dict of a state's structure has a key twice")
    return items


def _ranks(payload: list[Json]) -> dict[int, Json]:
    """Each rank's node, checked: no rank is there twice."""
    found: dict[int, Json] = {}
    for rank, child in payload:
        if type(rank) is not int or rank < 0 or rank in found:
            raise FormatError(f"{rank!r} isn't a rank, or is there twice")
        found[rank] = child
    return found


def from_json(node: Json, depth: int = 0) -> Any:
    """Rebuild the containers of a structure, with a `Mark` for each tensor.

    An object becomes the dict that its `state_dict` gave.  Plain values are
    decoded.  The inverse of `flatten`, but for the tensors.  What each rank
    has of its own is a dict by rank: see `of_rank`.
    """
    kind, payload = split_node(node, depth)
    if kind == "value":
        return decode_value(payload)
    if kind == "tensor":
        return Mark(payload)
    if kind in ("object", "rank"):
        return from_json(payload, depth + 1)
    if kind == "dict":
        return {key: from_json(child, depth + 1) for key, child in _items(payload)}
    if kind == "ranks":
        return {rank: from_json(child, depth + 1) for rank, child in _ranks(payload).items()}
    items = [from_json(child, depth + 1) for child in payload]
    return items if kind == "list" else tuple(items)


def of_rank(node: Json, rank: int) -> Json | None:
    """The structure as one rank has it; None if it has nothing here.

    In a list or a tuple, where the others' places must stay, None is then a value.
    """
    return _of_rank(node, rank, 0) if _has_own(node, 0) else node


def _has_own(node: Json, depth: int) -> bool:
    """Whether anything in it is some rank's own."""
    kind, payload = split_node(node, depth)
    if kind in ("rank", "ranks"):
        return True
    if kind in ("tensor", "value"):
        return False
    inside = {"object": [payload]}.get(kind, payload)
    children = [child for _, child in inside] if kind == "dict" else inside
    return any(_has_own(child, depth + 1) for child in children if not _is_leaf(child))


def _of_rank(node: Json, rank: int, depth: int) -> Json | None:
    kind, payload = split_node(node, depth)
    if kind == "ranks":
        own = _ranks(payload).get(rank)
        return None if own is None else _of_rank(own, rank, depth + 1)
    if kind in ("tensor", "value"):
        return node
    if kind == "rank":
        return _of_rank(payload, rank, depth + 1)
    if kind == "object":
        inner = _of_rank(payload, rank, depth + 1)
        return None if inner is None else {kind: inner}
    if kind == "dict":
        pairs = [[key, _of_rank(child, rank, depth + 1)] for key, child in payload]
        return {"dict": [pair for pair in pairs if pair[1] is not None]}
    children = [_of_rank(child, rank, depth + 1) for child in payload]
    return {kind: [{"value": None} if child is None else child for child in children]}


def absent_of(node: Json, rank: int) -> Iterator[Path]:
    """The paths at which each rank has something of its own, and this rank nothing."""
    if _has_own(node, 0):
        yield from _absent_of(node, rank, (), 0)


def _absent_of(node: Json, rank: int, path: Path, depth: int) -> Iterator[Path]:
    kind, payload = split_node(node, depth)
    if kind == "ranks":
        own = _ranks(payload).get(rank)
        if own is None:
            yield path
        else:
            yield from _absent_of(own, rank, path, depth + 1)
        return
    for keys, child in _inside(kind, payload):
        yield from _absent_of(child, rank, (*path, *keys), depth + 1)


def of_one(node: Json, depth: int = 0) -> Json:
    """The structure of a state that only one process has, to whom all is its own."""
    kind, payload = split_node(node, depth)
    if kind == "rank":
        return of_one(payload, depth + 1)
    if kind in ("tensor", "value"):
        return node
    if kind == "dict":
        return {kind: [[key, of_one(child, depth + 1)] for key, child in payload]}
    if kind == "object":
        return {kind: of_one(payload, depth + 1)}
    return {kind: [of_one(child, depth + 1) for child in payload]}


def numbered(
    node: Json, numbers: Mapping[int, int], rank: int | None = None, depth: int = 0
) -> Json:
    """The structure with other numbers for its tensors.

    With a `rank`, whose structure it is, its own things are marked as its.
    """
    kind, payload = split_node(node, depth)
    if kind == "value":
        return node
    if kind == "tensor":
        return {kind: numbers[payload]}
    if kind == "dict":
        pairs = [[key, numbered(child, numbers, rank, depth + 1)] for key, child in payload]
        return {kind: pairs}
    if kind in ("object", "rank"):
        inner = numbered(payload, numbers, rank, depth + 1)
        return {kind: inner} if kind == "object" or rank is None else {"ranks": [[rank, inner]]}
    return {kind: [numbered(child, numbers, rank, depth + 1) for child in payload]}


class ConflictError(Exception):
    """Two ranks have different things at one place."""

    def __init__(self, path: Path, reason: str) -> None:
        """`path` is the place."""
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


def join(one: Json, other: Json, path: Path = ()) -> Json:
    """What two ranks' structures are together: dicts may each have keys that the other lacks.

    Raises:
        ConflictError: something else is different.
    """
    (kind, first), (other_kind, second) = split_node(one, len(path)), split_node(other, len(path))
    if NOBODYS in (one, other):
        return other if one == NOBODYS else one
    if kind != other_kind:
        raise ConflictError(path, f"{kind} here, {other_kind} there")
    if kind in ("tensor", "value"):
        if json.dumps(first) != json.dumps(second):
            raise ConflictError(path, f"{_brief(one)} here, {_brief(other)} there")
        return one
    if kind == "object":
        return {kind: join(first, second, path)}
    if kind == "ranks":
        return {kind: [*first, *second]}
    if kind == "dict":
        return {kind: _join_dicts(first, second, path)}
    if len(first) != len(second):
        raise ConflictError(path, f"{len(first)} entries here, {len(second)} there")
    pairs = enumerate(zip(first, second, strict=True))
    return {kind: [join(a, b, (*path, at)) for at, (a, b) in pairs]}


def _join_dicts(first: list[Json], second: list[Json], path: Path) -> list[Json]:
    found = {json.dumps(key): [key, child] for key, child in first}
    for key, child in second:
        have = found.setdefault(json.dumps(key), [key, child])
        if have[1] is not child:
            have[1] = join(have[1], child, (*path, decode_value(key)))
    return list(found.values())


def _brief(node: Json) -> str:
    ((kind, payload),) = node.items()
    return f"{json.dumps(payload)[:60]}" if kind == "value" else "another array"
