"""Match the leaves of a checkpoint with those of a state, by name."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gpuckpt.arrays import Tensor, are_apart, form_of, look_all
from gpuckpt.errors import InvalidError, MismatchError, NotFoundError
from gpuckpt.manifest import Manifest
from gpuckpt.names import names_of
from gpuckpt.remaking import Fresh, Remade, fill_fresh
from gpuckpt.shards import Shards
from gpuckpt.structure import Mark, Path, absent_of, from_json, nodes_at, of_rank, walk_json
from gpuckpt.tree import Flat, Leaf, is_object
from gpuckpt.values import Json, decode_value

Rename = Mapping[str, str] | Callable[[str], str] | None


@dataclass(slots=True)
class Match:
    """Which leaf of the state gets what from the checkpoint.

    `filled`: tensors of the state, whole or shards, that are written in place,
    by the position of their source (of its first row).  `leaves` and `objects`:
    what else is put at which path, with `Fresh` where a tensor is still to be
    made; `touched` are the paths of all leaves that get something.  `matched`,
    `missing`, `unexpected` are names of the state; `mismatched` maps a name to the reason.
    `kept` are those that each rank has of its own, and this one not in the
    checkpoint: they keep their values.
    """

    filled: dict[int, list[Tensor]] = field(default_factory=dict)
    leaves: dict[Path, Any] = field(default_factory=dict)
    objects: dict[Path, Any] = field(default_factory=dict)
    touched: set[Path] = field(default_factory=set)
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, str] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)

    def raise_if_not_exact(self, subject: str) -> None:
        """Raise `MismatchError` unless every name has its counterpart."""
        if self.missing or self.unexpected or self.mismatched:
            raise MismatchError(
                subject,
                missing=self.missing,
                unexpected=self.unexpected,
                mismatched=[f"{name}: {reason}" for name, reason in self.mismatched.items()],
            )


def match(
    flat: Flat,
    manifest: Manifest,
    *,
    names: Iterable[str] | None = None,
    rename: Rename = None,
    whole_objects: bool = True,
    rank: int = 0,
) -> Match:
    """Match a state, taken apart, with a checkpoint.  Changes and allocates nothing.

    What each rank has of its own is that of `rank`.

    `names` are names or globs of the state's leaves, `rename` leads from the
    checkpoint's names to the state's.  An object that has its counterpart in
    the checkpoint gets its whole state (`whole_objects`), even leaves that it
    doesn't have yet; but not where `names` or `rename` pick leaves.

    Raises:
        NotFoundError: one of `names` fits no leaf at all.
    """
    result, saved = Match(), Saved.of(manifest, rank)
    whole = (
        _whole_objects(flat, saved, result)
        if whole_objects and names is None and not rename
        else ()
    )
    stored = _stored_leaves(saved, whole, rename)
    target = dict(zip(flat.names, flat.leaves, strict=True))
    if whole:
        target = {name: leaf for name, leaf in target.items() if not _inside(leaf.path, whole)}
    if names is not None:
        wanted = select(names, [*target, *(name for name in stored if name not in target)])
        stored = {name: node for name, node in stored.items() if name in wanted}
        target = {name: leaf for name, leaf in target.items() if name in wanted}
    for name, leaf in target.items():
        if name in stored:
            _match_leaf(name, leaf, stored[name], saved, result)
        else:
            own = _inside(leaf.path, saved.absent)
            (result.kept if own else result.missing).append(name)
    result.unexpected = [name for name in stored if name not in target]
    _check_ties(saved.shards, result)
    return result


def is_enough(found: Match) -> bool:
    """Whether a manifest that is partial has every row that a state needs."""
    if found.missing or found.unexpected or found.mismatched:
        return False
    wanted: list[Fresh | Remade] = []
    for tree in (found.leaves, found.objects):
        fill_fresh(tree, wanted.append)
    return not wanted


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint as one rank has it: its tree, and where that has nothing for this rank."""

    structure: Json
    absent: frozenset[Path]
    shards: Shards

    @classmethod
    def of(cls, manifest: Manifest, rank: int) -> Saved:
        """What `rank` has of a checkpoint."""
        absent = frozenset(absent_of(manifest.structure, rank))
        structure = of_rank(manifest.structure, rank) or {"dict": []}
        return cls(structure, absent, Shards(manifest))


def select(patterns: Iterable[str], names: Sequence[str]) -> set[str]:
    """The names that equal a pattern, fit it as a glob, or lie below it.

    Raises:
        NotFoundError: a pattern fits nothing; it says what is near.
    """
    if isinstance(patterns, str):
        patterns = [patterns]
    chosen: set[str] = set()
    for pattern in patterns:
        fits = {name for name in names if name == pattern or name.startswith(f"{pattern}.")}
        fits |= {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        if not fits:
            near = difflib.get_close_matches(pattern, names, 3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise NotFoundError(f"names: nothing is called {pattern!r}{hint}")
        chosen |= fits
    return chosen


def _whole_objects(flat: Flat, saved: Saved, result: Match) -> frozenset[Path]:
    """Match outermost objects with their counterparts at the same paths."""
    outermost: set[Path] = set()
    inside = {leaf.path: leaf for leaf in flat.leaves}
    nodes = nodes_at(saved.structure, flat.opened.keys())
    for path in sorted(flat.opened, key=len):
        node = nodes.get(path)
        if node is None or not ({"object", "dict"} & node.keys()) or _inside(path, outermost):
            continue
        outermost.add(path)
        whole = _Whole(flat.opened, inside, saved, result)
        result.objects[path] = whole.state(from_json(node), flat.opened[path], path)
    return frozenset(outermost)


@dataclass(frozen=True, slots=True)
class _Whole:
    """An object's stored state, its tensors filled in place where the object has their like."""

    opened: Mapping[Path, Any]
    inside: Mapping[Path, Leaf]
    saved: Saved
    result: Match

    def state(self, tree: Any, here: Any, path: Path) -> Any:
        """What `tree`, from the checkpoint, becomes where the object has `here`."""
        if isinstance(tree, dict):
            if path in self.opened and is_object(here):  # one within the other
                self.result.objects[path] = self.state(tree, self.opened[path], path)
                return here
            found = {k: self.state(v, _child(here, k), (*path, k)) for k, v in tree.items()}
            return found | {k: here[k] for k in self._kept(here, path) if k not in found}
        if isinstance(tree, list | tuple):
            children = enumerate(tree)
            return type(tree)([self.state(v, _child(here, k), (*path, k)) for k, v in children])
        if path in self.saved.absent:  # in a list, where something stands in its place
            return here
        return self._tensor(tree, path) if isinstance(tree, Mark) else tree

    def _kept(self, here: Any, path: Path) -> list[Any]:
        """Keys of what this rank has of its own, and the checkpoint not of it."""
        keys = [p[-1] for p in self.saved.absent if p[:-1] == path and p and isinstance(here, dict)]
        return [key for key in keys if key in here]

    def _tensor(self, mark: Mark, path: Path) -> Any:
        shards = self.saved.shards
        spec = shards.spec(mark.tensor)
        leaf = self.inside[path].leaf if path in self.inside else None
        here = look_all(leaf, spec.name)
        self.result.matched.append(spec.name)
        if not here:
            return Fresh(shards.first(mark.tensor), spec.device, spec.kind)
        reason = _difference(here, shards, mark.tensor)
        if reason:  # it keeps its value, if that is what the caller wants
            self.result.mismatched[spec.name] = reason
            return leaf
        return _filling(here, leaf, mark.tensor, self.saved.shards, self.result)


def _child(node: Any, key: Any) -> Any:
    """What is below `node` at `key`; None if nothing is."""
    if isinstance(node, Mapping):
        return node.get(key)
    return node[key] if isinstance(node, list | tuple) and key in range(len(node)) else None


def _stored_leaves(saved: Saved, whole: Collection[Path], rename: Rename) -> dict[str, Json]:
    """The checkpoint's leaves by the names that the state has for them."""
    every = list(walk_json(saved.structure))
    names = names_of([path for path, _ in every])
    if not (rename or whole or saved.absent):  # mostly
        return dict(zip(names, (node for _, node in every), strict=True))
    renamed = _renamer(rename)
    stored: dict[str, Json] = {}
    for name, (path, node) in zip(names, every, strict=True):
        if _inside(path, whole) or _inside(path, saved.absent):
            continue
        new = renamed(name)
        if new in stored:
            raise InvalidError(f"rename: two leaves of the checkpoint would be called {new!r}")
        stored[new] = node
    return stored


def _renamer(rename: Rename) -> Callable[[str], str]:
    """A mapping renames whole names, and the beginnings of names up to a dot."""
    if rename is None:
        return lambda name: name
    if not isinstance(rename, Mapping):
        return rename
    table = dict(rename)

    def renamed(name: str) -> str:
        if name in table:
            return table[name]
        end = name.rfind(".")
        while end >= 0:
            if name[:end] in table:
                return _joined(table[name[:end]], name[end + 1 :])
            end = name.rfind(".", 0, end)
        return _joined(table[""], name) if "" in table else name

    return renamed


def _joined(beginning: str, rest: str) -> str:
    return f"{beginning}.{rest}" if beginning else rest


def _match_leaf(name: str, leaf: Leaf, node: Json, saved: Saved, result: Match) -> None:
    here, shards = look_all(leaf.leaf, name), saved.shards
    if "value" in node:
        if here:
            result.mismatched[name] = "an array here, a plain value in the checkpoint"
            return
        result.leaves[leaf.path] = decode_value(node["value"])
    elif not here and leaf.leaf is not None:
        kind = type(leaf.leaf).__name__
        result.mismatched[name] = f"a plain value here ({kind}), an array in the checkpoint"
        return
    elif not here:
        spec = shards.spec(node["tensor"])
        result.leaves[leaf.path] = Fresh(shards.first(node["tensor"]), spec.device, spec.kind)
    elif reason := _difference(here, shards, node["tensor"]):
        result.mismatched[name] = reason
        return
    else:
        new = _filling(here, leaf.leaf, node["tensor"], shards, result)
        if new is not leaf.leaf:
            result.leaves[leaf.path] = new
    result.touched.add(leaf.path)
    result.matched.append(name)


def _filling(
    here: Sequence[Tensor], leaf: Any, position: int, shards: Shards, result: Match
) -> Any:
    """What a leaf becomes that is filled: itself, in place, or something new in its place."""
    first = shards.first(position)
    if all(tensor.writable for tensor in here):
        result.filled.setdefault(first, []).extend(here)
        return leaf
    made = [Fresh(first, one.spec.device, one.spec.kind, one.spec.box) for one in here]
    if form_of(leaf) is not None:
        return Remade(leaf, tuple(made), here[0].spec.kind)
    return replace(made[0], box=None)


def _difference(here: Sequence[Tensor], shards: Shards, position: int) -> str | None:
    """Why a leaf, which these are, can't be filled from the checkpoint's; None if it can."""
    saved = shards.spec(position)
    for tensor in here:
        mine = tensor.spec
        if (mine.dtype, mine.full_shape) != (saved.dtype, saved.shape):
            return (
                f"{mine.dtype}{list(mine.full_shape)} here, "
                f"{saved.dtype}{list(saved.shape)} in the checkpoint"
            )
    for tensor in here:
        lack = shards.lack(position, tensor.spec.box)
        if lack is not None:
            return lack
    return None


def _check_ties(shards: Shards, result: Match) -> None:
    """Names that are one array here must have had the same bytes in the checkpoint."""
    tensors = [target for targets in result.filled.values() for target in targets]
    if are_apart(tensors):  # mostly
        return
    seen: dict[tuple[object, ...], int] = {}
    for position, targets in result.filled.items():
        unique = {target.where: target for target in targets}
        for where, target in list(unique.items()):
            other = seen.setdefault(where, position)
            if other != position and shards.prints(other) != shards.prints(position):
                del unique[where]
                result.mismatched[target.spec.name] = (
                    f"one array with {shards.spec(other).name} here, "
                    "two different ones in the checkpoint"
                )
        result.filled[position] = list(unique.values())


def _inside(path: Path, roots: Collection[Path]) -> bool:
    return bool(roots) and any(path[:end] in roots for end in range(len(path) + 1))
