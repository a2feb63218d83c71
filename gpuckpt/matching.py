"""Match the leaves of a checkpoint with those of a state, by name."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpuckpt.arrays import Tensor, finish, look, make
from gpuckpt.devices import Devices
from gpuckpt.errors import InvalidError, MismatchError, NotFoundError
from gpuckpt.manifest import Manifest
from gpuckpt.names import names_of
from gpuckpt.structure import Mark, Path, from_json, nodes_at, walk_json
from gpuckpt.tree import Flat, Leaf, is_object
from gpuckpt.values import Json, decode_value

Rename = Mapping[str, str] | Callable[[str], str] | None


@dataclass(frozen=True, slots=True)
class Fresh:
    """A tensor to be made anew, since the state has none that could be filled."""

    position: int
    device: str
    kind: str


@dataclass(slots=True)
class Match:
    """Which leaf of the state gets what from the checkpoint.

    `filled`: tensors of the state that are written in place, by the position
    of their source.  `leaves` and `objects`: what else is put at which path,
    with `Fresh` where a tensor is still to be made; `touched` are the paths of
    all leaves that get something.  `matched`, `missing`,
    `unexpected` are names of the state; `mismatched` maps a name to the reason.
    """

    filled: dict[int, list[Tensor]] = field(default_factory=dict)
    leaves: dict[Path, Any] = field(default_factory=dict)
    objects: dict[Path, Any] = field(default_factory=dict)
    touched: set[Path] = field(default_factory=set)
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, str] = field(default_factory=dict)

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
) -> Match:
    """Match a state, taken apart, with a checkpoint.  Changes and allocates nothing.

    `names` are names or globs of the state's leaves, `rename` leads from the
    checkpoint's names to the state's.  An object that has its counterpart in
    the checkpoint gets its whole state (`whole_objects`), even leaves that it
    doesn't have yet; but not where `names` or `rename` pick leaves.

    Raises:
        NotFoundError: one of `names` fits no leaf at all.
    """
    result = Match()
    whole = (
        _whole_objects(flat, manifest, result)
        if whole_objects and names is None and not rename
        else ()
    )
    stored = _stored_leaves(manifest, whole, rename)
    target = {
        name: leaf
        for name, leaf in zip(flat.names, flat.leaves, strict=True)
        if not _inside(leaf.path, whole)
    }
    if names is not None:
        wanted = select(names, [*target, *(name for name in stored if name not in target)])
        stored = {name: node for name, node in stored.items() if name in wanted}
        target = {name: leaf for name, leaf in target.items() if name in wanted}
    result.missing = [name for name in target if name not in stored]
    result.unexpected = [name for name in stored if name not in target]
    for name, leaf in target.items():
        if name in stored:
            _match_leaf(name, leaf, stored[name], manifest, result)
    _check_ties(manifest, result)
    return result


def is_enough(found: Match) -> bool:
    """Whether a manifest that is partial has every row that a state needs."""
    if found.missing or found.unexpected or found.mismatched:
        return False
    wanted: list[Fresh] = []
    for tree in (found.leaves, found.objects):
        fill_fresh(tree, wanted.append)
    return not wanted


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


def fill_fresh(tree: Any, made: Callable[[Fresh], Any]) -> Any:
    """`tree` with each `Fresh` in it replaced."""
    if isinstance(tree, Fresh):
        return made(tree)
    if is_object(tree):
        return tree
    if isinstance(tree, dict):
        return {key: fill_fresh(child, made) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([fill_fresh(child, made) for child in tree])
    return tree


def make_fresh(fresh: Fresh, manifest: Manifest, devices: Devices) -> Tensor:
    """Allocate what `fresh` stands for."""
    return make(manifest.tensors[fresh.position].spec, devices[fresh.device])


def finish_fresh(fresh: Fresh, tensor: Tensor) -> Any:
    """Hand a tensor that has been filled to its library."""
    return finish(tensor, fresh.kind)


def _whole_objects(flat: Flat, manifest: Manifest, result: Match) -> frozenset[Path]:
    """Match outermost objects with their counterparts at the same paths."""
    outermost: set[Path] = set()
    inside = {leaf.path: leaf for leaf in flat.leaves}
    nodes = nodes_at(manifest.structure, flat.opened.keys())
    for path in sorted(flat.opened, key=len):
        node = nodes.get(path)
        if node is None or not ({"object", "dict"} & node.keys()) or _inside(path, outermost):
            continue
        outermost.add(path)
        whole = _Whole(flat.opened, inside, manifest, result)
        result.objects[path] = whole.state(from_json(node), flat.opened[path], path)
    return frozenset(outermost)


@dataclass(frozen=True, slots=True)
class _Whole:
    """An object's stored state, its tensors filled in place where the object has their like."""

    opened: Mapping[Path, Any]
    inside: Mapping[Path, Leaf]
    manifest: Manifest
    result: Match

    def state(self, tree: Any, here: Any, path: Path) -> Any:
        """What `tree`, from the checkpoint, becomes where the object has `here`."""
        if isinstance(tree, dict):
            if path in self.opened and is_object(here):  # one within the other
                self.result.objects[path] = self.state(tree, self.opened[path], path)
                return here
            return {k: self.state(v, _child(here, k), (*path, k)) for k, v in tree.items()}
        if isinstance(tree, list | tuple):
            children = enumerate(tree)
            return type(tree)([self.state(v, _child(here, k), (*path, k)) for k, v in children])
        return self._tensor(tree, path) if isinstance(tree, Mark) else tree

    def _tensor(self, mark: Mark, path: Path) -> Any:
        spec = self.manifest.tensors[mark.tensor].spec
        leaf = self.inside[path].leaf if path in self.inside else None
        here = look(leaf, spec.name)
        self.result.matched.append(spec.name)
        if here is None:
            return Fresh(mark.tensor, spec.device, spec.kind)
        reason = _difference(here, self.manifest, mark.tensor)
        if reason:  # it keeps its value, if that is what the caller wants
            self.result.mismatched[spec.name] = reason
            return leaf
        if here.writable:
            self.result.filled.setdefault(mark.tensor, []).append(here)
            return leaf
        return Fresh(mark.tensor, here.spec.device, here.spec.kind)


def _child(node: Any, key: Any) -> Any:
    """What is below `node` at `key`; None if nothing is."""
    if isinstance(node, Mapping):
        return node.get(key)
    return node[key] if isinstance(node, list | tuple) and key in range(len(node)) else None


def _stored_leaves(manifest: Manifest, whole: Collection[Path], rename: Rename) -> dict[str, Json]:
    """The checkpoint's leaves by the names that the state has for them."""
    every = list(walk_json(manifest.structure))
    renamed = _renamer(rename)
    stored: dict[str, Json] = {}
    for name, (path, node) in zip(names_of([path for path, _ in every]), every, strict=True):
        if _inside(path, whole):
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


def _match_leaf(name: str, leaf: Leaf, node: Json, manifest: Manifest, result: Match) -> None:
    here = look(leaf.leaf, name)
    if "value" in node:
        if here is not None:
            result.mismatched[name] = "an array here, a plain value in the checkpoint"
            return
        result.leaves[leaf.path] = decode_value(node["value"])
    elif here is None and leaf.leaf is not None:
        kind = type(leaf.leaf).__name__
        result.mismatched[name] = f"a plain value here ({kind}), an array in the checkpoint"
        return
    elif here is None:
        spec = manifest.tensors[node["tensor"]].spec
        result.leaves[leaf.path] = Fresh(node["tensor"], spec.device, spec.kind)
    elif reason := _difference(here, manifest, node["tensor"]):
        result.mismatched[name] = reason
        return
    elif here.writable:
        result.filled.setdefault(node["tensor"], []).append(here)
    else:
        result.leaves[leaf.path] = Fresh(node["tensor"], here.spec.device, here.spec.kind)
    result.touched.add(leaf.path)
    result.matched.append(name)


def _difference(here: Tensor, manifest: Manifest, position: int) -> str | None:
    """Why a tensor can't be filled from the checkpoint's; None if it can."""
    mine, saved = here.spec, manifest.tensors[position].spec
    if (mine.dtype, mine.shape) != (saved.dtype, saved.shape):
        return (
            f"{mine.dtype}{list(mine.shape)} here, "
            f"{saved.dtype}{list(saved.shape)} in the checkpoint"
        )
    held = sum(chunk.nbytes for chunk in manifest.tensors[position].chunks)
    if held != saved.nbytes:
        return f"this data file holds only {held} of its {saved.nbytes} bytes"
    return None


def _check_ties(manifest: Manifest, result: Match) -> None:
    """Names that are one array here must have had the same bytes in the checkpoint."""
    seen: dict[tuple[object, ...], int] = {}
    for position, targets in result.filled.items():
        unique = {target.where: target for target in targets}
        for where, target in list(unique.items()):
            other = seen.setdefault(where, position)
            one, two = (manifest.tensors[at] for at in (other, position))
            same = [c.fingerprint for c in one.chunks] == [c.fingerprint for c in two.chunks]
            if not same:
                del unique[where]
                result.mismatched[target.spec.name] = (
                    f"one array with {one.spec.name} here, two different ones in the checkpoint"
                )
        result.filled[position] = list(unique.values())


def _inside(path: Path, roots: Collection[Path]) -> bool:
    return bool(roots) and any(path[:end] in roots for end in range(len(path) + 1))
