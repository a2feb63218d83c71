"""Load a checkpoint into a new state, or restore it into one that is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from gpuckpt.arrays import KINDS, Tensor, finish, make
from gpuckpt.devices import parse_name
from gpuckpt.errors import (
    CheckpointError,
    DeviceMemoryError,
    InvalidError,
    MismatchError,
    NotFoundError,
)
from gpuckpt.hostmemory import available_nbytes
from gpuckpt.manifest import Manifest
from gpuckpt.matching import Match, select
from gpuckpt.names import names_of
from gpuckpt.portions import jobs_of
from gpuckpt.remaking import Fresh, Remade, fill_fresh, finish_fresh, make_fresh, reachable
from gpuckpt.resources import Resources
from gpuckpt.restore import Progress, restore_tensors
from gpuckpt.shards import Shards
from gpuckpt.sizes import format_nbytes
from gpuckpt.snapshot import place
from gpuckpt.spec import Spec
from gpuckpt.stores import Store
from gpuckpt.structure import Mark, Path, from_json, of_rank, walk_json
from gpuckpt.tree import Flat
from gpuckpt.values import Json


def load_state(
    manifest: Manifest,
    store: Store,
    resources: Resources,
    *,
    device: str | None = None,
    names: Iterable[str] | None = None,
    like: str | None = None,
    rank: int = 0,
    progress: Progress = lambda _: None,
) -> Any:
    """Make a state of a checkpoint: nested containers, arrays where `device` says.

    Arrays are whole, and what each rank has of its own is that of `rank`.
    With `names`, a flat dict of the leaves they pick, by name.
    """
    structure = of_rank(manifest.structure, rank) or {"dict": []}
    tree = from_json(structure) if names is None else _picked(structure, names)
    shards = Shards(manifest)
    firsts = {at: shards.first(at) for at in sorted(_positions(tree))}
    wanted = sorted(set(firsts.values()))
    specs = {at: shards.spec(at) for at in wanted}
    _check_whole(shards, specs)
    kinds = {at: _kind(spec, device, like) for at, spec in specs.items()}
    _check_room([spec for at, spec in specs.items() if kinds[at][0] == "cpu"])
    devices = resources.devices
    tensors = {at: make(spec, devices[kinds[at][0]]) for at, spec in specs.items()}
    targets = {at: [tensor] for at, tensor in tensors.items()}
    restore_tensors(list(jobs_of(shards, store, targets)), resources, progress)
    finished = {at: finish(tensors[at], kinds[at][1]) for at in wanted}
    return _fill(tree, {at: finished[first] for at, first in firsts.items()})


def fill_match(  # noqa: PLR0917
    state: Any,
    flat: Flat,
    found: Match,
    manifest: Manifest,
    store: Store,
    resources: Resources,
    elsewhere: Mapping[str, Store] = MappingProxyType({}),
) -> dict[Path, Any]:
    """Bring what was matched into `state`: tensors first, then values and objects.

    Rows' bytes are in `store`, or where `elsewhere` says by their labels.
    Returns the leaves that were put there, but for those filled in place.
    """
    _check_in_place(state, found.leaves)
    made: dict[Fresh, Tensor] = {}
    shards = Shards(manifest)

    def one(fresh: Fresh | Remade) -> Fresh | Remade:
        wanted.append(fresh)
        for each in (fresh,) if isinstance(fresh, Fresh) else fresh.shards:
            if each not in made:
                made[each] = make_fresh(each, shards, resources.devices)
        return fresh

    wanted: list[Fresh | Remade] = []
    whole = fill_fresh(found.objects, partial(reachable, devices=resources.devices))
    leaves, objects = fill_fresh(found.leaves, one), fill_fresh(whole, one)
    targets: dict[int, list[Tensor]] = {at: list(into) for at, into in found.filled.items()}
    for fresh, tensor in made.items():
        targets.setdefault(fresh.position, []).append(tensor)
    restore_tensors(list(jobs_of(shards, store, targets, elsewhere)), resources)
    finished = {fresh: finish_fresh(fresh, made) for fresh in dict.fromkeys(wanted)}
    leaves, objects = (fill_fresh(tree, finished.__getitem__) for tree in (leaves, objects))
    try:
        placed = place(state, flat, leaves, objects, found.touched)
    except CheckpointError:
        raise
    except Exception as error:
        raise MismatchError(
            f"{store.root}, step {manifest.step}: an object's load_state_dict refused what was "
            f"saved ({type(error).__name__}: {error}), after arrays had been filled",
            hint="give it the structure that was saved, or restore other names",
        ) from error
    assert placed is state
    placed_leaves: dict[Path, Any] = leaves
    return placed_leaves


def _check_in_place(state: Any, leaves: dict[Path, Any]) -> None:
    """See that no leaf's change would need another object in the place of `state` itself."""
    for path, new in leaves.items():
        node = state
        for key in path:
            if not isinstance(node, tuple | Mapping) or hasattr(type(node), "__setitem__"):
                break
            node = node[key]
        else:
            if new is not node:
                kind = type(state).__name__
                raise InvalidError(
                    f"a {kind} can't be restored in place; put it into a dict or a list"
                )


def _picked(structure: Json, names: Iterable[str]) -> dict[str, Any]:
    every = list(walk_json(structure))
    nodes = dict(zip(names_of([path for path, _ in every]), (n for _, n in every), strict=True))
    chosen = select(names, list(nodes))
    return {name: from_json(node) for name, node in nodes.items() if name in chosen}


def _check_whole(shards: Shards, specs: Mapping[int, Spec]) -> None:
    for at, spec in specs.items():
        if lack := shards.lack(at, spec.box):
            raise NotFoundError(
                f"{spec.label}: {lack}; give warm_start all data files that the step's manifest "
                "names, or pick other names"
            )


def _check_room(specs: Iterable[Spec]) -> None:
    """Before anything is allocated: the system may grant more than it has, and kill for it."""
    wanted, room = sum(spec.nbytes for spec in specs), available_nbytes()
    if room is not None and wanted > room:
        raise DeviceMemoryError(
            f"the tensors take {format_nbytes(wanted)}, and the host has {format_nbytes(room)} "
            "left; load some of them by names=, or onto another device"
        )


def _positions(tree: Any) -> set[int]:
    if isinstance(tree, Mark):
        return {tree.tensor}
    if isinstance(tree, dict):
        return set().union(*(_positions(child) for child in tree.values()))
    if isinstance(tree, list | tuple):
        return set().union(*(_positions(child) for child in tree))
    return set()


def _fill(tree: Any, tensors: dict[int, Any]) -> Any:
    if isinstance(tree, Mark):
        return tensors[tree.tensor]
    if isinstance(tree, dict):
        return {key: _fill(child, tensors) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([_fill(child, tensors) for child in tree])
    return tree


def _kind(spec: Spec, device: str | None, like: str | None) -> tuple[str, str]:
    """The device and the library for a tensor that is loaded."""
    if like is not None and like not in KINDS:
        raise InvalidError(f"like is one of {', '.join(KINDS)}; got {like!r}")
    if spec.kind not in KINDS:
        raise NotFoundError(f"{spec.name} was saved from {spec.kind!r}; pass like='numpy'")
    if like in ("numpy", "cupy") and device is None:
        device = "cpu" if like == "numpy" else "cuda"
    where = parse_name(device if device is not None else spec.device)
    own = {"numpy": "cpu", "cupy": "cuda"}
    kind = like or spec.kind
    if like is None and kind in own and not where.startswith(own[kind]):
        kind = "numpy" if where == "cpu" else "cupy"
    if kind == "numpy" and where != "cpu":
        raise InvalidError(f"like='numpy' holds host memory only, device={device!r} was asked for")
    return where, kind
