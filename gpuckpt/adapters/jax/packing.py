"""A pytree as a state that gpuckpt saves, and as one that it restores into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuckpt.adapters.jax.leaves import is_array, is_key, is_static, is_weak, outgoing
from gpuckpt.adapters.jax.notes import NOTES, Notes
from gpuckpt.adapters.jax.paths import at, leaves_of, nested
from gpuckpt.adapters.jax.targets import Target, like
from gpuckpt.arrays import Hollow
from gpuckpt.boxes import whole_box
from gpuckpt.dtypes import name_of
from gpuckpt.errors import InvalidError, MismatchError, UnsupportedError
from gpuckpt.names import names_of
from gpuckpt.structure import Path
from gpuckpt.tree import is_object


def packed(tree: Any) -> dict[Any, Any]:
    """A tree as the state that is saved: nested dicts, by the names of JAX's paths.

    Functions among the leaves are left out.  Nothing is copied, nor waited for.

    Raises:
        UnsupportedError: a leaf can't be saved, or its path isn't its own.
    """
    leaves, _ = leaves_of(tree)
    kept = {path: leaf for path, leaf in leaves.items() if not is_static(leaf)}
    names = dict(zip(kept, names_of(list(kept)), strict=True))
    notes = Notes(
        [names[path] for path, leaf in kept.items() if is_weak(leaf)],
        {names[path]: str(leaf.dtype) for path, leaf in kept.items() if is_key(leaf)},
    )
    state = nested({path: outgoing(leaf, names[path]) for path, leaf in kept.items()})
    return _with_notes(state, notes) if notes.known else state


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A tree as a state that is packed when it is saved: not at steps that aren't."""

    tree: Any

    def state_dict(self) -> dict[Any, Any]:
        """The tree, packed."""
        return packed(self.tree)

    def load_state_dict(self, _: object) -> None:
        """Not for restoring: that makes a new tree.

        Raises:
            InvalidError: always.
        """
        raise InvalidError("a pytree is restored as a new one: use gpuckpt.jax.restore")


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """A tree that is to be restored: `state` is what gpuckpt restores into.

    `leaves` are the tree's own, by path; they are neither changed nor read.
    """

    treedef: Any
    leaves: Mapping[Path, Any]
    names: Mapping[Path, str]
    targets: Mapping[Path, Target]
    notes: Notes
    state: dict[Any, Any]

    @classmethod
    def of(cls, tree: Any) -> Wanted:
        """What is wanted in the places of a tree's leaves: arrays, or `jax.ShapeDtypeStruct`s.

        Raises:
            UnsupportedError: a leaf can't be restored.
        """
        leaves, treedef = leaves_of(tree)
        kept = [path for path, leaf in leaves.items() if not is_static(leaf)]
        names = dict(zip(kept, names_of(kept), strict=True))
        targets = {
            path: Target.of(leaves[path], names[path]) for path in kept if is_array(leaves[path])
        }
        places = {path: _place(leaves[path], names[path], targets.get(path)) for path in kept}
        notes = Notes()
        state = _with_notes(nested(places), notes)
        return cls(treedef, leaves, names, targets, notes, state)

    @property
    def is_untouched(self) -> bool:
        """Whether nothing has been restored into `state` yet."""
        places = (at(self.state, path) for path in self.names)
        return all(one is None or isinstance(one, Hollow) or is_object(one) for one in places)

    def tree(self, subject: str, *, strict: bool = True) -> Any:
        """The tree, of what a restore has put into `state`.

        Without `strict`, what the checkpoint doesn't have is as it was.

        Raises:
            MismatchError: keys of another kind, an array in place of a plain
                value, or something is missing that has no value of its own.
        """
        missing, different = [], []
        found = dict(self.leaves)
        for path, name in self.names.items():
            there, leaf = at(self.state, path), self.leaves[path]
            if there is None or isinstance(there, Hollow):
                if strict or _is_abstract(leaf):
                    missing.append(name)
                continue
            reason, found[path] = self._restored(path, name, there)
            different += [f"{name}: {reason}"] if reason else []
        if missing or different:
            raise MismatchError(subject, missing=missing, mismatched=different)
        return self.treedef.unflatten(found.values())

    def _restored(self, path: Path, name: str, there: Any) -> tuple[str, Any]:
        """What a leaf has become, and why it can't be that."""
        leaf, target = self.leaves[path], self.targets.get(path)
        if target is not None:
            saved = self.notes.keys.get(name, str(leaf.dtype))
            if is_key(leaf) and saved != str(leaf.dtype):
                return f"{leaf.dtype} here, {saved} in the checkpoint", leaf
            weak = name in self.notes.weak if self.notes.known else is_weak(leaf)
            return "", like(target.array(there), weak=weak)
        if isinstance(leaf, np.ndarray):
            return "", there.made[whole_box(leaf.shape)].array
        if not hasattr(there, "ndim") or isinstance(there, np.generic):
            return "", there
        kind = type(leaf)
        if there.ndim or kind not in (bool, int, float, complex):
            return f"a {kind.__name__} here, an array in the checkpoint", leaf
        return "", kind(np.asarray(there).item())


def _with_notes(state: dict[Any, Any], notes: Notes) -> dict[Any, Any]:
    if NOTES in state:
        raise UnsupportedError(NOTES, "this key is gpuckpt's own; call yours otherwise")
    return {**state, NOTES: notes}


def _place(leaf: Any, name: str, target: Target | None) -> Any:
    """What gpuckpt restores into for a leaf: None takes whatever the checkpoint has."""
    if target is not None:
        return target.hollow()
    if isinstance(leaf, np.ndarray):
        dtype = name_of(leaf.dtype)
        if dtype is None:
            raise UnsupportedError(name, f"elements of type {leaf.dtype} can't be restored")
        return Hollow(dtype, leaf.shape, ((whole_box(leaf.shape), "cpu"),))
    return leaf if is_object(leaf) else None


def _is_abstract(leaf: Any) -> bool:
    """Whether a leaf has no values that could stay."""
    deleted = getattr(leaf, "is_deleted", None)
    return is_array(leaf) and (deleted is None or deleted())
