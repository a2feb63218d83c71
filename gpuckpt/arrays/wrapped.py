"""Look at many sharded leaves of one kind at once, by the arrays that are in them.

As `probe` does for plain arrays: it says only whether leaves are as they were
when `look_all` saw them, and where their memory is now.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter, call, is_
from typing import Any, Literal

import numpy as np

from gpuckpt.arrays import probe
from gpuckpt.arrays.probe import Addresses, Facts, Library
from gpuckpt.sharded import Sharded

Wrapping = Literal["sharded", "dtensor"]
WRAPPINGS: tuple[Wrapping, ...] = ("sharded", "dtensor")
Located = tuple[Addresses, list[Any]]


@dataclass(frozen=True, slots=True)
class Wrapped:
    """What doesn't change about leaves of one kind, each of which is one shard.

    `places` is what says where a leaf lies in its tensor, `types` what kind of
    array is in it; `facts` are those of the arrays in leaves number `at`,
    which are of one library.  A mesh is known again as the very one: an equal
    one may have another place for this rank.
    """

    wrapping: Wrapping
    places: list[Any]
    meshes: list[weakref.ref[Any]]
    types: list[type]
    facts: list[tuple[list[int], Facts]]


def wrapping(kind: type) -> Wrapping | None:
    """How leaves of exactly this type are sharded; None if each has to be looked at."""
    if kind is Sharded:
        return "sharded"
    torch = sys.modules.get("torch.distributed.tensor")
    return "dtensor" if kind is getattr(torch, "DTensor", None) else None


def facts_of(kind: Library | Wrapping, leaves: Sequence[Any]) -> Facts | Wrapped | None:
    """The properties of leaves, each of which is one tensor; None if that can't be told in bulk."""
    if kind == "sharded" or kind == "dtensor":  # noqa: PLR1714 - so that mypy sees it
        return _wrapped(kind, leaves)
    return probe.facts(kind, leaves)


def _wrapped(kind: Wrapping, leaves: Sequence[Any]) -> Wrapped | None:
    arrays = list(map(_INSIDE[kind], leaves))
    types = list(map(type, arrays))
    libraries = {one: probe.probed(one) for one in set(types)}
    found: dict[Library, list[int]] = {}
    for at, one in enumerate(types):
        library = libraries[one]
        if library is None:
            return None
        found.setdefault(library, []).append(at)
    facts = [
        (at, probe.facts(library, [arrays[one] for one in at])) for library, at in found.items()
    ]
    meshes = list(map(weakref.ref, _meshes(kind, leaves)))
    return Wrapped(kind, list(map(_PLACE[kind], leaves)), meshes, types, facts)


def locate_all(leaves: Sequence[Any], before: Facts | Wrapped) -> Located | None:
    """Where as many leaves lie now, and what keeps each one's memory alive: see `probe.locate`."""
    if isinstance(before, Facts):
        return probe.locate(leaves, before)
    kind = before.wrapping
    meshes = _meshes(kind, leaves)
    if not all(map(is_, map(call, before.meshes), meshes)):
        return None
    arrays = list(map(_INSIDE[kind], leaves))
    if list(map(type, arrays)) != before.types:
        return None
    if list(map(_PLACE[kind], leaves)) != before.places:
        return None
    if len(before.facts) == 1:
        return probe.locate(arrays, before.facts[0][1])
    addresses: Addresses = np.empty(len(leaves), np.uint64)
    owners: list[Any] = [None] * len(leaves)
    for at, facts in before.facts:
        found = probe.locate([arrays[one] for one in at], facts)
        if found is None:
            return None
        addresses[at] = found[0]
        for one, owner in zip(at, found[1], strict=True):
            owners[one] = owner
    return addresses, owners


def _meshes(kind: Wrapping, leaves: Sequence[Any]) -> list[Any]:
    return list(map(attrgetter("device_mesh"), leaves)) if kind == "dtensor" else []


_INSIDE = {"sharded": attrgetter("array"), "dtensor": attrgetter("_local_tensor")}
_PLACE = {"sharded": attrgetter("shape", "offset"), "dtensor": attrgetter("shape", "placements")}
