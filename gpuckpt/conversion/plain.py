"""Values out of a pickle as the structure of a state, and leaves by their paths as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpuckpt.conversion.opcodes import Call, Items, Name, is_call
from gpuckpt.structure import DEPTH_LIMIT, Path
from gpuckpt.values import Json, NotPlainError, encode_value

# Shared parts are there once in a pickle, and as often as they are used in a structure.
_NODES_MAX = 1 << 20
_PLAIN = (bool, int, float, str, bytes, type(None))


def plain_node(value: Any) -> Json:
    """A value of dicts, lists, tuples, numbers, text, bytes and None as a node.

    Raises:
        NotPlainError: something else is in it; the message says what.
    """
    return _Nodes().node(value, 0)


class _Nodes:
    def __init__(self) -> None:
        self._left = _NODES_MAX

    def node(self, value: Any, depth: int) -> Json:
        self._left -= 1
        if depth > DEPTH_LIMIT or self._left < 0:
            raise NotPlainError("nested too deep, or too large")
        if isinstance(value, _PLAIN):
            return {"value": encode_value(value)}
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [self.node(one, depth + 1) for one in value]}
        if is_call(value, "__builtin__.bytes") and value.args == ():  # as protocol 2 has b""
            return {"value": encode_value(b"")}
        if is_call(value, "_codecs.encode") and _is_latin(value):
            return {"value": encode_value(value.args[0].encode("latin1"))}
        if is_call(value, "collections.OrderedDict") and value.args == ():
            return self._dict(value.pairs, depth)
        if isinstance(value, Items):
            return self._dict(value.pairs, depth)
        raise NotPlainError(_described(value))

    def _dict(self, pairs: Sequence[tuple[Any, Any]], depth: int) -> Json:
        rows: dict[Any, Json] = {}
        for key, one in pairs:
            if not isinstance(key, _PLAIN):
                raise NotPlainError(f"a dict with the key {_described(key)}")
            rows[key] = self.node(one, depth + 1)
        return {"dict": [[encode_value(key), node] for key, node in rows.items()]}


def _is_latin(value: Call) -> bool:
    """Bytes, as pickles of protocol 2 have them."""
    args = value.args
    return (
        isinstance(args, tuple)
        and len(args) == 2
        and isinstance(args[0], str)
        and max(args[0], default="") <= "\xff"
        and args[1] == "latin1"
    )


def _described(value: Any) -> str:
    what = value.what if isinstance(value, Call) else value
    if isinstance(what, Name):
        return f"a {what}"
    return f"a {type(what).__name__}"


def nested(rows: Sequence[tuple[Path, Json]]) -> Json | None:
    """The structure that has each node at its path; None if no structure has.

    Keys that are numbers from 0 on, all of them, make a list.
    """
    if any(not path or len(path) > DEPTH_LIMIT for path, _ in rows):
        return None
    groups: dict[tuple[type, Any], list[tuple[Path, Json]]] = {}
    for path, node in rows:
        groups.setdefault((type(path[0]), path[0]), []).append((path[1:], node))
    children: list[tuple[Any, Json]] = []
    for (_, key), inside in groups.items():
        child = inside[0][1] if len(inside) == 1 and not inside[0][0] else nested(inside)
        if child is None:
            return None
        children.append((key, child))
    numbers = [key for key, _ in children if type(key) is int]
    if len(numbers) == len(children) and sorted(numbers) == list(range(len(children))):
        return {"list": [child for _, child in sorted(children, key=lambda pair: pair[0])]}
    return {"dict": [[encode_value(key), child] for key, child in children]}
