"""What a state consists of, and the same frozen at one moment: the nouns between the layers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuckpt.apart import Flag
from gpuckpt.devices import Frozen, Wants
from gpuckpt.plan import Plan
from gpuckpt.spec import Spec
from gpuckpt.structure import of_one
from gpuckpt.values import Json


@dataclass(frozen=True, eq=False)
class Roster:
    """What stays the same from save to save: structure, shapes, dtypes and devices.

    Compared by identity: as long as nothing of it changes, a `Census` gives
    the same one, so that what follows from it can be kept beside it.

    `template` is the structure; its plain values are those of the moment when
    it was made.  `specs` has each array once, however many names it has, and
    each shard of one that is sharded, under one name; `strides` are in bytes,
    one tuple for each of them.
    """

    template: Json
    specs: tuple[Spec, ...]
    strides: tuple[tuple[int, ...], ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs)

    @cached_property
    def by_device(self) -> dict[str, list[int]]:
        """The positions of each device's tensors; not to be changed."""
        found: dict[str, list[int]] = {}
        for position, spec in enumerate(self.specs):
            found.setdefault(spec.device, []).append(position)
        return found

    @cached_property
    def private(self) -> frozenset[int]:
        """The positions of tensors that are only in what each rank has of its own."""
        own: set[int] = set()
        shared: set[int] = set()
        _sort_tensors(self.template, own, shared)
        names = {self.specs[at].name for at in own - shared}
        return frozenset(at for at, spec in enumerate(self.specs) if spec.name in names)

    @cached_property
    def _ranked(self) -> _Form:
        return _Form(self.template)

    @cached_property
    def _alone(self) -> _Form:
        """The template for a state that one process alone has."""
        return _Form(of_one(self.template)) if _has_own(self.template) else self._ranked

    def filled(self, values: Sequence[Json]) -> Json:
        """The template with `values` in its places; it shares all else with the template."""
        return self._ranked.filled(values)

    def filled_alone(self, values: Sequence[Json]) -> Json:
        """The same of a state that one process alone has: nothing is marked as a rank's own."""
        return self._alone.filled(values)


class _Form:
    """A structure whose plain values are put in, time and again."""

    def __init__(self, template: Json) -> None:
        self._template = template
        found: set[int] = set()
        _find_open(template, found)
        self._open = frozenset(found)  # nodes that are plain values or have some inside

    def filled(self, values: Sequence[Json]) -> Json:
        return _filled(self._template, iter(values), self._open) if values else self._template


@dataclass(frozen=True, eq=False)
class Inventory:
    """What a state consists of at one moment.

    `addresses` are those of element [0, …, 0] of each of `specs`, in its
    device's memory (0 if it has no element), and `owners` keep this memory
    alive, whatever becomes of the state's leaves.  `values` are the plain
    values, encoded, in the structure's order.
    """

    roster: Roster
    addresses: npt.NDArray[np.uint64]
    owners: list[Any]
    values: tuple[Json, ...]

    @property
    def structure(self) -> Json:
        """The state's structure with its plain values; made anew whenever it is asked for.

        It is that of a state which this process alone has.
        """
        return self.roster.filled_alone(self.values)

    @property
    def rank_structure(self) -> Json:
        """The same for one rank of a group: `rank` nodes tell what is its own."""
        return self.roster.filled(self.values)

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The tensors' specs, each array once."""
        return self.roster.specs

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.roster.nbytes

    def by_device(self) -> dict[str, list[int]]:
        """The positions of each device's tensors; not to be changed."""
        return self.roster.by_device


@dataclass(slots=True)
class Snapshot:
    """A state's tensors as they were at one moment, until `release`.

    `plans` and `frozen` are by device; the state's own arrays are held by
    `frozen` alone, and no longer than needed.  `staged` is set once nothing of
    the state is read any more, which was `staged_seconds` after the snapshot
    began.
    """

    inventory: Inventory
    plans: Mapping[str, Plan]
    frozen: dict[str, Frozen] = field(default_factory=dict)
    staged: Flag = field(default_factory=Flag)
    staged_seconds: float = 0.0
    begun: float = field(default_factory=time.perf_counter)
    _kept: bool = False

    @property
    def live(self) -> list[str]:
        """The devices on which the caller's own memory is read."""
        return [name for name, frozen in self.frozen.items() if frozen.live]

    @property
    def mode(self) -> str:
        """`hold` if the caller's own memory is read anywhere, else `copy`."""
        return "hold" if self.live else "copy"

    def order_update(self) -> None:
        """Order what the caller does next after all reads of the state's live memory."""
        if not self.staged.is_set():
            for frozen in self.frozen.values():
                frozen.order_update()

    def bring(self, wants: Wants | None = None) -> None:
        """Begin to bring to the host what has memory of its own there."""
        for frozen in self.frozen.values():
            frozen.bring(wants)

    def settle(self) -> None:
        """Wait until copies have been made, and until what is brought at once is there.

        Then what they were made from may go.
        """
        settled = [frozen.settle() for frozen in self.frozen.values()]
        if all(settled):
            self._set_staged()

    def end_downloads(self) -> None:
        """Say that no more downloads will begin."""
        for frozen in self.frozen.values():
            frozen.end_downloads()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, copies aren't let go of, so that they can be read again; at its end, all is."""
        self._kept = not self.live
        try:
            yield
        finally:
            self._kept = False
            self.release()

    def release(self) -> None:
        """Let go of the state; safe to call twice."""
        if self._kept:
            return
        first: BaseException | None = None
        for frozen in self.frozen.values():
            try:  # each, whatever happens to those before
                frozen.release()
            except BaseException as error:
                first = first or error
        self._set_staged()
        if first is not None:
            raise first

    def _set_staged(self) -> None:
        if not self.staged.is_set():
            self.staged_seconds = time.perf_counter() - self.begun
            self.staged.set()


def _below(kind: str, payload: Any) -> list[Json]:
    """The nodes inside of a node."""
    if kind in ("object", "rank"):
        return [payload]
    if kind == "dict":
        return [child for _, child in payload]
    return payload if kind in ("list", "tuple") else []


def _has_own(node: Json) -> bool:
    ((kind, payload),) = node.items()
    return kind == "rank" or any(map(_has_own, _below(kind, payload)))


def _sort_tensors(node: Json, own: set[int], shared: set[int], *, inside: bool = False) -> None:
    """Collect the numbers of tensors in and outside of what is a rank's own."""
    ((kind, payload),) = node.items()
    if kind == "tensor":
        (own if inside else shared).add(payload)
    for child in _below(kind, payload):
        _sort_tensors(child, own, shared, inside=inside or kind == "rank")


def _find_open(node: Json, found: set[int]) -> bool:
    """Collect the nodes that are plain values or have some inside: all, not only the first."""
    ((kind, payload),) = node.items()
    inside = sum([_find_open(child, found) for child in _below(kind, payload)]) > 0
    if inside or kind == "value":
        found.add(id(node))
        return True
    return False


def _filled(node: Json, values: Iterator[Json], inside: frozenset[int]) -> Json:
    """A node that has plain values, with the next of `values` for each of them."""
    ((kind, payload),) = node.items()
    if kind == "value":
        return {"value": next(values)}
    if kind in ("object", "rank"):
        return {kind: _filled(payload, values, inside)}
    if kind == "dict":
        return {
            "dict": [
                [key, _filled(child, values, inside)] if id(child) in inside else [key, child]
                for key, child in payload
            ]
        }
    return {
        kind: [
            _filled(child, values, inside) if id(child) in inside else child for child in payload
        ]
    }
