"""Items of a committed step: into trees that are given, or as nested dicts and lists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from gpuckpt.adapters.jax.notes import NOTES, Notes
from gpuckpt.adapters.jax.packing import Wanted
from gpuckpt.adapters.jax.paths import LONE
from gpuckpt.adapters.jax.targets import like
from gpuckpt.adapters.orbax.items import from_json, kind_of, target_of
from gpuckpt.commit import open_step
from gpuckpt.errors import FormatError, NotFoundError
from gpuckpt.fallback import Restoration
from gpuckpt.loading import load_state
from gpuckpt.manifest import Manifest
from gpuckpt.names import names_of
from gpuckpt.resources import Resources
from gpuckpt.seal import Seal
from gpuckpt.shards import Shards
from gpuckpt.stores import Store
from gpuckpt.structure import Mark, Path
from gpuckpt.structure import from_json as from_structure
from gpuckpt.values import Json

_IMPLS = ("threefry2x32", "rbg", "unsafe_rbg")


@dataclass(frozen=True, slots=True)
class StepItems:
    """The items of one step, each of which is read by itself."""

    manifest: Manifest
    store: Store
    nodes: Mapping[str, Json]

    @classmethod
    def of(cls, store: Store, step: int, seal: Seal | None) -> StepItems:
        """Those of a committed step.

        Raises:
            NotFoundError: there is no such step.
            FormatError: it wasn't saved by a manager.
        """
        manifest = open_step(store, step, seal)
        nodes = manifest.structure.get("dict")
        if nodes is None or any(not isinstance(key, str) for key, _ in nodes):
            raise FormatError(
                f"{store.root}, step {step}: not saved by a CheckpointManager; "
                "restore it by gpuckpt.jax.load"
            )
        return cls(manifest, store, dict(nodes))

    def restored(self, name: str, args: Any, resources: Resources) -> Any:
        """One item, as args of a restore want it; None wants it as it was saved.

        Raises:
            NotFoundError: there is no such item.
            MismatchError: it doesn't fit the tree that is wanted.
        """
        if name not in self.nodes:
            there = ", ".join(sorted(self.nodes)) or "none"
            raise NotFoundError(f"{self._subject}: no item is called {name!r}; there are: {there}")
        kind, node = kind_of(args, "Restore"), self.nodes[name]
        if "value" in node or kind == "Json":
            return from_json(node.get("value"), name)
        tree, strict = target_of(args, name)
        if tree is None:
            found = self._as_saved(node, resources)
            return found[LONE[0]] if kind in ("Array", "JaxRandomKey") else found
        wanted = Wanted.of(tree)
        part = replace(self.manifest, structure={"dict": [[name, node]]})
        restoration = Restoration(
            {name: wanted.state}, resources, names=None, rename=None, strict=strict
        )
        restoration.take(self.store, part)
        return wanted.tree(f"{self._subject}, {name} doesn't fit the tree", strict=strict)

    def shapes(self, name: str) -> Any:
        """What stands for an item's arrays, in nested dicts and lists; JSON as it is."""
        node, shards = self.nodes[name], Shards(self.manifest)
        if "value" in node:
            return from_json(node["value"], name)

        def shape(mark: Any) -> Any:
            if not isinstance(mark, Mark):
                return mark
            spec = shards.spec(mark.tensor)
            return jax.ShapeDtypeStruct(spec.shape, jax.numpy.dtype(spec.dtype))

        nest = from_structure(node)
        nest.pop(NOTES, None)
        return _with_lists(nest, {path: shape(leaf) for path, leaf in _walk(nest, ())})

    @property
    def _subject(self) -> str:
        return f"{self.store.root}, step {self.manifest.step}"

    def _as_saved(self, node: Json, resources: Resources) -> Any:
        part = replace(self.manifest, structure=node)
        nest, notes = load_state(part, self.store, resources, device="cpu"), Notes()
        notes.load_state_dict(nest.pop(NOTES, {}))
        leaves = dict(_walk(nest, ()))
        names = dict(zip(leaves, names_of(list(leaves)), strict=True))
        dressed = {path: _dressed(leaf, names[path], notes) for path, leaf in leaves.items()}
        return _with_lists(nest, dressed)


def _dressed(leaf: Any, name: str, notes: Notes) -> Any:
    """A leaf with what its bytes don't tell of it."""
    if name in notes.keys:
        for impl in _IMPLS:
            if str(jax.random.key(0, impl=impl).dtype) == notes.keys[name]:
                return jax.random.wrap_key_data(leaf, impl=impl)
        raise FormatError(f"{name}: keys of type {notes.keys[name]} aren't known to this jax")
    return like(leaf, weak=True) if name in notes.weak else leaf


def _walk(node: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if not isinstance(node, dict):
        yield path, node
        return
    for key, child in node.items():
        yield from _walk(child, (*path, key))


def _with_lists(node: Any, leaves: Mapping[Path, Any], path: Path = ()) -> Any:
    """Nested dicts with other leaves; those whose keys are indices become lists."""
    if not isinstance(node, dict):
        return leaves[path]
    found = {key: _with_lists(child, leaves, (*path, key)) for key, child in node.items()}
    if found and set(found) == set(range(len(found))):
        return [found[at] for at in range(len(found))]
    return found
