"""A checkpoint's names as a tree, each branch with what its tensors are together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gpuckpt.statistics import Statistics
from gpuckpt.tensors import TensorEntry


@dataclass(slots=True)
class Branch:
    """A name or a common beginning of names, and what is below it.

    `leaf` is the row or the plain value of that very name.  Sums are over all
    tensors at it and below; `statistics` are None if none of them has any.
    """

    label: str
    name: str
    leaf: Any = None
    is_leaf: bool = False
    below: dict[str, Branch] = field(default_factory=dict)
    tensors: int = 0
    values: int = 0
    raw_nbytes: int = 0
    encoded_nbytes: int = 0
    statistics: Statistics | None = None

    def walk(self, depth: int | None = None, at: int = 0) -> Iterator[tuple[int, Branch]]:
        """Itself and what is below, in order, with how deep; at most `depth` levels of names."""
        for child in self.below.values():
            yield at, child
            if depth is None or at + 1 < depth:
                yield from child.walk(depth, at + 1)


def tree_of(leaves: Mapping[str, Any]) -> Branch:
    """The tree of leaves by name; names are cut at their dots, but exact ones (`["a.b"]`)."""
    root = Branch("", "")
    for name, leaf in leaves.items():
        parts = [name] if name.startswith("[") else name.split(".")
        branches = [root]
        for at, part in enumerate(parts):
            beginning = ".".join(parts[: at + 1])
            branches.append(branches[-1].below.setdefault(part, Branch(part, beginning)))
        branches[-1].leaf, branches[-1].is_leaf = leaf, True
        for branch in branches:
            _add(branch, leaf)
    return root


def encoded_nbytes(entry: TensorEntry) -> int:
    """Bytes of a tensor's chunks on disk, without those of their bases."""
    return sum(chunk.extent.length for chunk in entry.chunks)


def _add(branch: Branch, leaf: Any) -> None:
    if not isinstance(leaf, TensorEntry):
        branch.values += 1
        return
    branch.tensors += 1
    branch.raw_nbytes += leaf.spec.nbytes
    branch.encoded_nbytes += encoded_nbytes(leaf)
    if leaf.statistics is not None:
        branch.statistics = (branch.statistics or Statistics()) + leaf.statistics
