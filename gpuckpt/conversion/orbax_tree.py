"""What is in Orbax's directories: `_METADATA`s, steps, items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuckpt.errors import CorruptError, NotFoundError
from gpuckpt.stores import read_all
from gpuckpt.stores.local import LocalStore
from gpuckpt.structure import Path as Keys
from gpuckpt.values import parse_json

TREE = "_METADATA"
STRINGS = "_strings.json"
REMEDY = "take the directory anew from where it was written"
_JSON_NBYTES_MAX = 256 << 20
_SEQUENCE = 1  # of `KeyType`: a list's or a tuple's place


@dataclass(frozen=True, slots=True)
class Item:
    """One checkpoint of a tree: its folder, and the leaves' paths with what `_METADATA` says."""

    path: Path
    tree: Mapping[str, Any]
    before: Keys

    def leaves(self) -> Iterator[tuple[Keys, str, str]]:
        """Of each leaf its path, the name of its array, and what kind of thing it is."""
        for entry in self.tree["tree_metadata"].values():
            keys = [(str(one["key"]), one["key_type"]) for one in entry["key_metadata"]]
            path = tuple(int(key) if kind == _SEQUENCE else key for key, kind in keys)
            kind = str(entry["value_metadata"]["value_type"])
            yield (*self.before, *path), ".".join(key for key, _ in keys), kind


def items_of(path: Path, step: int | None) -> tuple[list[Item], int | None]:
    """What is at a path: one tree, or those of a step; and the step."""
    if (path / TREE).is_file():
        return [Item(path, _tree(path), ())], None
    found = step_folders(path)
    if not found or (step is not None and step not in found):
        there = f"; there are {', '.join(map(str, sorted(found)))}" if found else ""
        raise NotFoundError(f"{path}: there is no step {step} of Orbax's{there}")
    number = max(found) if step is None else step
    folders = item_folders(found[number])
    alone = len(folders) == 1
    return [Item(one, _tree(one), () if alone else (one.name,)) for one in folders], number


def step_folders(path: Path) -> dict[int, Path]:
    """Folders of steps that have trees; none if it is no folder."""
    folders = [one for one in path.iterdir() if one.name.isdecimal()] if path.is_dir() else []
    return {int(one.name): one for one in folders if item_folders(one)}


def item_folders(path: Path) -> list[Path]:
    """Folders of trees: the folder itself, or those in it."""
    inside = sorted(path.iterdir()) if path.is_dir() else []
    return [path] if (path / TREE).is_file() else [one for one in inside if (one / TREE).is_file()]


def _tree(path: Path) -> Mapping[str, Any]:
    found = read_json(path, TREE)
    if not isinstance(found.get("tree_metadata"), dict):
        raise CorruptError(f"{path}/{TREE}", "it has no tree", REMEDY)
    return found


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object of a file of a stranger.

    Raises:
        CorruptError: it is none.
    """
    store = LocalStore(path)
    if (nbytes := store.size(name)) > _JSON_NBYTES_MAX:
        raise CorruptError(f"{path}/{name}", f"it has {nbytes} bytes", REMEDY)
    try:
        found = parse_json(read_all(store, name))
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}/{name}", f"no JSON ({error})", REMEDY) from error
    if not isinstance(found, dict):
        raise CorruptError(f"{path}/{name}", "no JSON object", REMEDY)
    return found
