"""Names of a state's leaves, which follow from their paths."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from gpuckpt.values import encode_value


def names_of(paths: Sequence[tuple[Any, ...]]) -> list[str]:
    """A name for each path, no two the same.

    A name is the path's keys with dots between them.  Where two paths would
    share one (`{"a.b": …, "a": {"b": …}}`, or the keys 0 and "0"), each of
    these is written exactly instead: `["a.b"]`, `["a"]["b"]`.  Keys that differ
    and are written alike (two NaNs) are numbered, from the second on: `…#2`.
    """
    names = [plain_name(path) for path in paths]
    exact: list[str] | None = None
    while len(set(names)) < len(names):
        exact = exact or _numbered([exact_name(path) for path in paths])
        seen = Counter(names)
        names = [own if seen[name] > 1 else name for own, name in zip(exact, names, strict=True)]
    return names


def plain_name(path: Iterable[Any]) -> str:
    """The path's keys with dots between them; keys that are no strings as JSON."""
    keys = tuple(path)
    if len(keys) == 1 and type(keys[0]) is str:  # mostly, or nearly
        return keys[0]
    return ".".join(key if isinstance(key, str) else key_text(key) for key in keys)


def exact_name(path: Iterable[Any]) -> str:
    """The path's keys as JSON, each in brackets."""
    return "".join(f"[{key_text(key)}]" for key in path)


def key_text(key: Any) -> str:
    """A key in words that don't depend on the version of Python or numpy, as its repr would.

    They differ for any two keys that are saved differently, equal as they may be.

    Raises:
        NotPlainError: it can't be a key.
    """
    return json.dumps(encode_value(key), separators=(",", ":"))


def _numbered(names: list[str]) -> list[str]:
    """Names with `#2`, `#3`, … at the second, third, … of those that are equal."""
    seen: Counter[str] = Counter()
    numbered = []
    for name in names:
        seen[name] += 1
        numbered.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return numbered
