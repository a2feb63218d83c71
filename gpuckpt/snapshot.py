"""Capture a state at one moment, and place restored leaves into a state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpuckpt.arrays import Tensor, look
from gpuckpt.devices import Device, Devices, Frozen
from gpuckpt.errors import DeviceMemoryError, InvalidError, UnsupportedError
from gpuckpt.inventory import Inventory, Snapshot
from gpuckpt.spec import Spec
from gpuckpt.tree import Flat, Path, flatten, rebuild
from gpuckpt.values import Json, NotPlainError, encode_value

MODES = ("auto", "copy", "hold")
ALIGNMENT = 512  # the most that a device aligns copies to


def take_inventory(state: Any) -> Inventory:
    """List the state's leaves, and see that each can be saved; copies and changes nothing.

    Raises:
        UnsupportedError: a leaf can't be saved; it names the leaf and says why.
    """
    flat = flatten(state)
    tensors: list[Tensor] = []
    positions: dict[tuple[object, ...], int] = {}
    for leaf, name in zip(flat.leaves, flat.names, strict=True):
        tensor = look(leaf.leaf, name)
        if tensor is None:
            leaf.node["value"] = _value(leaf.leaf, name)
            continue
        position = positions.setdefault(tensor.where, len(tensors))
        if position == len(tensors):
            tensors.append(tensor)
        leaf.node["tensor"] = position
    return Inventory(flat.structure, tuple(tensors))


def capture(
    inventory: Inventory, devices: Devices, *, mode: str, host_room_nbytes: int
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
    snapshot = Snapshot(inventory.structure, inventory.specs, "copy")
    snapshot.sources = [None] * len(inventory.tensors)
    try:
        for name, positions in inventory.by_device().items():
            tensors = [inventory.tensors[position] for position in positions]
            room = host_room_nbytes if name == "cpu" else devices[name].room()
            frozen, copied = _freeze(tensors, devices[name], mode, room)
            snapshot.frozen[name] = frozen
            snapshot.mode = snapshot.mode if copied else "hold"
            for position, source in zip(positions, frozen.arrays, strict=True):
                snapshot.sources[position] = source
    except BaseException:
        snapshot.release()
        raise
    return snapshot


def copy_nbytes(inventory: Inventory, device: str) -> int:
    """Bytes that a copy of one device's tensors takes."""
    return _copy_nbytes(spec for spec in inventory.specs if spec.device == device)


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


def _value(leaf: Any, name: str) -> Json:
    try:
        return encode_value(leaf)
    except NotPlainError as error:
        raise UnsupportedError(
            name,
            f"{error} can't be saved; a leaf is an array, a plain value (int, float, complex, "
            "str, bytes, bool, None), or has state_dict and load_state_dict",
        ) from None


def _freeze(
    tensors: Sequence[Tensor], device: Device, mode: str, room_nbytes: int
) -> tuple[Frozen, bool]:
    """Freeze one device's tensors, and whether by a copy."""
    arrays = [tensor.array for tensor in tensors]
    nbytes = _copy_nbytes(tensor.spec for tensor in tensors)
    if mode == "copy" and device.name == "cpu" and nbytes > room_nbytes:
        raise InvalidError(
            f"snapshot='copy' needs {nbytes} bytes for host tensors, and memory= leaves "
            f"{room_nbytes}; raise memory, or pass snapshot='hold'"
        )
    if mode == "copy":
        return device.freeze(arrays, copy=True), True
    if mode == "auto" and nbytes <= room_nbytes:
        # What is free isn't always free in one piece.
        with contextlib.suppress(DeviceMemoryError):
            return device.freeze(arrays, copy=True), True
    return device.freeze(arrays, copy=False), False


def _copy_nbytes(specs: Iterable[Spec]) -> int:
    """Bytes of copies, each rounded up to what a device aligns them to."""
    return sum(-(-spec.nbytes // ALIGNMENT) * ALIGNMENT for spec in specs)
