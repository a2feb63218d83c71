"""Tensors grouped by layer, however many there are, by what their names have in common."""

from __future__ import annotations

import re
from collections.abc import Iterable

# So many groups at most, for so many lines in a table.
GROUPS_MAX = 64
# So few tensors are shown each by itself.
FEW = 24
_OTHERS = "… others"
_DOTS = re.compile(r"[./]")


class Layers:
    """Which group a tensor belongs to: a beginning of its name, at a dot or a slash."""

    def __init__(self, names: Iterable[str]) -> None:
        """Groups for these names; other names are put where they fit best."""
        tree = _Node("")
        for name in names:
            tree.add(_parts(name))
        few = tree.count <= FEW
        groups = [*tree.children.values()]
        waiting = sorted(groups, key=lambda node: len(node.children))
        while waiting:
            node = waiting.pop(0)
            more = [*node.children.values()]
            splits = more and (few or not node.is_layer)
            if splits and len(groups) - 1 + node.ends + len(more) <= GROUPS_MAX:
                at = groups.index(node)
                groups[at : at + 1] = [node] * node.ends + more
                waiting = sorted([*waiting, *more], key=lambda one: len(one.children))
        self._names = {node.name for node in groups[:GROUPS_MAX]}

    def of(self, name: str) -> str:
        """The group of the tensor called `name`."""
        parts = _parts(name)
        for length in range(len(parts), 0, -1):
            beginning = "".join(parts[:length])
            if beginning in self._names:
                return beginning
        return _OTHERS


class _Node:
    """A beginning of names, and what follows it in them."""

    def __init__(self, name: str) -> None:
        self.name, self.count, self.ends = name, 0, False
        self.children: dict[str, _Node] = {}

    @property
    def is_layer(self) -> bool:
        """Whether the tensors are the next below: weight, bias."""
        return not any(child.children for child in self.children.values())

    def add(self, parts: list[str]) -> None:
        node = self
        node.count += 1
        for part in parts:
            node = node.children.setdefault(part, _Node(node.name + part))
            node.count += 1
        node.ends = True


def _parts(name: str) -> list[str]:
    """A name cut before each dot and slash, at most eight times: its first parts are its place."""
    cuts = [match.start() for match in _DOTS.finditer(name) if match.start()][:8]
    return [name[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(name)], strict=True)]
