"""Which leaves of a state have places of their own in Fluid's folders; the others are variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gpuckpt.conversion.port import Outline
from gpuckpt.conversion.serials import LOOKUP, is_trainer
from gpuckpt.spec import Spec
from gpuckpt.structure import Mark, from_json, walk_json
from gpuckpt.structure import Path as Keys

# Beside the variables: of those with levels of detail, a list of these.
LOD = "__lod__"


@dataclass(frozen=True, slots=True)
class Rows:
    """A SelectedRows: two positions, and a number."""

    rows: int
    height: int
    value: int


@dataclass
class Files:
    """What is written: positions by the files' names, and trainers' values.

    `kept` are the names of the values among them.
    """

    variables: dict[str, int | Rows] = field(default_factory=dict)
    levels: dict[str, list[int]] = field(default_factory=dict)
    tables: dict[str, int | Rows] = field(default_factory=dict)
    trainers: dict[str, dict[str, int | str]] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)


def sort_leaves(outline: Outline) -> Files:
    """Sort a state's leaves into files."""
    files, specs = Files(), outline.specs
    tree = from_json(outline.structure)
    placed: set[Keys] = set()
    for key, node in tree.items() if isinstance(tree, dict) else ():
        if is_trainer(key) and _is_trainers(node):
            files.trainers[key] = node
            placed.add((key,))
        elif (rows := _rows(node, specs)) is not None and isinstance(key, str):
            files.variables[key] = rows
            placed.add((key,))
        elif key == LOOKUP and isinstance(node, dict):
            placed |= _place_tables(files, node, specs)
        elif key == LOD and isinstance(node, dict):
            placed |= _place_levels(files, node, tree, specs)
    paths = [path for path, _ in walk_json(outline.structure)]
    for path, (name, leaf) in zip(paths, outline.leaves.items(), strict=True):
        if path[:1] in placed or path[:2] in placed:
            files.kept.add(name)
        elif "tensor" in leaf:
            files.variables[name] = leaf["tensor"]
    return files


def _place_tables(files: Files, tables: Mapping[Any, Any], specs: tuple[Spec, ...]) -> set[Keys]:
    placed: set[Keys] = set()
    for name, node in tables.items():
        found = node.tensor if isinstance(node, Mark) else _rows(node, specs)
        if found is not None and isinstance(name, str):
            files.tables[name] = found
            placed.add((LOOKUP, name))
    return placed


def _place_levels(
    files: Files, levels: Mapping[Any, Any], tree: Mapping[Any, Any], specs: tuple[Spec, ...]
) -> set[Keys]:
    placed: set[Keys] = set()
    for name, node in levels.items():
        known = isinstance(name, str) and isinstance(tree.get(name), Mark)
        if known and isinstance(node, list) and all(_is_line(one, "uint64", specs) for one in node):
            files.levels[name] = [one.tensor for one in node]
            placed.add((LOD, name))
    return placed


def _rows(node: Any, specs: tuple[Spec, ...]) -> Rows | None:
    """A dict of `rows`, `height` and `value` as a SelectedRows; None if it is another."""
    if not isinstance(node, dict) or set(node) != {"rows", "height", "value"}:
        return None
    rows, height, value = node["rows"], node["height"], node["value"]
    if type(height) is not int or abs(height) >= 1 << 63 or not isinstance(value, Mark):
        return None
    if not _is_line(rows, "int64", specs):
        return None
    shape = specs[value.tensor].shape
    count = specs[rows.tensor].shape[0]
    return Rows(rows.tensor, height, value.tensor) if shape and shape[0] >= count else None


def _is_line(node: Any, dtype: str, specs: tuple[Spec, ...]) -> bool:
    """Whether it is an array of one axis and this type."""
    if not isinstance(node, Mark):
        return False
    spec = specs[node.tensor]
    return spec.dtype == dtype and len(spec.shape) == 1


def _is_trainers(node: Any) -> bool:
    """Whether it is a dict of numbers and text, by text."""
    return isinstance(node, dict) and all(
        isinstance(key, str) and type(value) in (int, str) for key, value in node.items()
    )
