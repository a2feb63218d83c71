"""Leaves that are made anew, where a state has none that could be filled in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gpuckpt.arrays import Tensor, assembled, finish, make
from gpuckpt.boxes import Box
from gpuckpt.devices import Devices
from gpuckpt.errors import NotFoundError
from gpuckpt.shards import Shards
from gpuckpt.tree import is_object


@dataclass(frozen=True, slots=True)
class Fresh:
    """A tensor to be made anew, since the state has none that could be filled.

    All of it, or a `box`.
    """

    position: int
    device: str
    kind: str
    box: Box | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Remade:
    """A leaf to be made anew out of shards that are to be: one like `leaf`, of library `kind`."""

    leaf: Any
    shards: tuple[Fresh, ...]
    kind: str


def fill_fresh(tree: Any, made: Callable[[Fresh | Remade], Any]) -> Any:
    """`tree` with each `Fresh` and `Remade` in it replaced."""
    if isinstance(tree, Fresh | Remade):
        return made(tree)
    if is_object(tree):
        return tree
    if isinstance(tree, dict):
        return {key: fill_fresh(child, made) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([fill_fresh(child, made) for child in tree])
    return tree


def reachable(fresh: Fresh | Remade, devices: Devices) -> Fresh | Remade:
    """The same, but on the host if it is a torch tensor whose device isn't here.

    For objects: what they are given they bring to where their own tensors are.
    """
    if isinstance(fresh, Fresh) and fresh.kind == "torch":
        try:
            devices[fresh.device]
        except NotFoundError:
            return replace(fresh, device="cpu")
    return fresh


def make_fresh(fresh: Fresh, shards: Shards, devices: Devices) -> Tensor:
    """Allocate what `fresh` stands for."""
    return make(shards.spec(fresh.position, fresh.box), devices[fresh.device])


def finish_fresh(fresh: Fresh | Remade, made: Mapping[Fresh, Tensor]) -> Any:
    """Hand tensors that have been filled to their library."""
    if isinstance(fresh, Fresh):
        return finish(made[fresh], fresh.kind)
    return assembled(fresh.leaf, [made[one] for one in fresh.shards], fresh.kind)
