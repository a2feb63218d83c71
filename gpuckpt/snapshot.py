"""Capture a state at one moment, and place restored leaves into a state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from gpuckpt.devices import Device, Devices, Frozen
from gpuckpt.errors import DeviceMemoryError, InvalidError
from gpuckpt.inventory import Inventory, Roster, Snapshot
from gpuckpt.plan import Plan, make_plans
from gpuckpt.structure import Path
from gpuckpt.tree import Flat, rebuild

MODES = ("auto", "copy", "hold")


class Planner:
    """Plans for a state's tensors, kept while the roster stays the same."""

    def __init__(self, chunk_nbytes: int, *, split: bool = True) -> None:
        """`split` says whether planes are wanted: not if nothing will be compressed."""
        self._chunk_nbytes, self._split = chunk_nbytes, split
        self._known: tuple[Roster | None, Mapping[str, Plan]] = (None, {})

    def plans(self, roster: Roster) -> Mapping[str, Plan]:
        """A plan for each device."""
        known, plans = self._known
        if roster is not known:
            plans = make_plans(
                *(roster.specs, roster.strides, roster.by_device),
                chunk_nbytes=self._chunk_nbytes,
                split=self._split,
            )
            self._known = roster, plans  # at once: an interrupt can't part them
        return plans


def capture(
    inventory: Inventory,
    plans: Mapping[str, Plan],
    devices: Devices,
    *,
    mode: str,
    host_room_nbytes: int,
) -> Snapshot:
    """Freeze the state at this moment of each device's current stream.

    `copy` copies every tensor on its own device (host tensors within
    `host_room_nbytes`), `hold` reads it later where it is, and `auto` copies
    where there is room.

    Raises:
        InvalidError: `copy` was asked for and host tensors don't fit the budget.
        DeviceMemoryError: `copy` was asked for and a device has no room.
    """
    if mode not in MODES:
        raise InvalidError(f"snapshot is one of {', '.join(MODES)}; got {mode!r}")
    snapshot = Snapshot(replace(inventory, owners=[]), plans)
    try:
        copied = {
            name: _is_copied(plan, devices[name], mode, host_room_nbytes)
            for name, plan in plans.items()
        }
        room = host_room_nbytes
        if copied.get("cpu"):
            room -= devices["cpu"].copy_nbytes(plans["cpu"])
        for name, plan in plans.items():
            owners = inventory.owners
            if len(plans) > 1:
                owners = [owners[tensor] for tensor in plan.tensors]
            freeze = partial(devices[name].freeze, plan, inventory.addresses, owners)
            frozen = _freeze(freeze, room, copy=copied[name], may_hold=mode == "auto")
            snapshot.frozen[name] = frozen
            room -= devices[name].ahead_nbytes if frozen.live else 0
    except BaseException:
        snapshot.release()
        raise
    return snapshot


def reserve(
    plans: Mapping[str, Plan], devices: Devices, mode: str, *, host_room_nbytes: int
) -> None:
    """Take the memory for copies, where there is room, before the first snapshot wants it."""
    for name, plan in plans.items() if mode != "hold" else ():
        device = devices[name]
        nbytes = device.copy_nbytes(plan)
        if nbytes <= host_room_nbytes if name == "cpu" else device.has_room(nbytes):
            with contextlib.suppress(DeviceMemoryError):
                device.reserve(nbytes)


def room_beside_copy(
    plans: Mapping[str, Plan], devices: Devices, mode: str, *, host_room_nbytes: int
) -> int:
    """Bytes of the room that a copy which must be made of host tensors leaves."""
    if mode != "copy" or "cpu" not in plans:
        return host_room_nbytes
    return max(host_room_nbytes - devices["cpu"].copy_nbytes(plans["cpu"]), 0)


def place(
    state: Any,
    flat: Flat,
    leaves: Mapping[Path, Any],
    objects: Mapping[Path, Any],
    touched: Iterable[Path] = (),
) -> Any:
    """Put restored leaves, and whole states of objects, in their places in `state`.

    `flat` is the same state taken apart.  `touched` are the paths of leaves
    that were restored in place; an object with none of all these inside is
    left alone.  Returns the state, or a new tuple if it was one.
    """
    if not (leaves or objects or flat.opened):  # nothing to put anywhere
        return state
    inside = {leaf.path: leaf.leaf for leaf in flat.leaves}
    changed = {path[:end] for path in (*leaves, *objects, *touched) for end in range(len(path) + 1)}
    opened = {
        path: inner
        for path, inner in flat.opened.items()
        if path in changed or any(path[:end] in objects for end in range(len(path)))
    }

    def new(path: Path, node: Any) -> Any:
        if path in objects:
            return objects[path]
        return leaves.get(path, inside.get(path, node))

    return rebuild(state, new, opened)


def _is_copied(plan: Plan, device: Device, mode: str, host_room_nbytes: int) -> bool:
    """Whether one device's tensors are to be copied."""
    if mode == "hold":
        return False
    nbytes = device.copy_nbytes(plan)
    fits = nbytes <= host_room_nbytes if device.name == "cpu" else True
    if mode == "copy" and not fits:
        raise InvalidError(
            f"snapshot='copy' needs {nbytes} bytes for host tensors, and memory= leaves "
            f"{host_room_nbytes}; raise memory, or pass snapshot='hold'"
        )
    return mode == "copy" or (fits and device.has_room(nbytes))


def _freeze(
    freeze: Callable[..., Frozen], host_nbytes: int, *, copy: bool, may_hold: bool
) -> Frozen:
    try:
        return freeze(copy=copy, host_nbytes=host_nbytes)
    except DeviceMemoryError:
        # What is free isn't always free in one piece.
        if not (copy and may_hold):
            raise
    return freeze(copy=False, host_nbytes=host_nbytes)
