"""Capture a state at one moment, and place restored leaves into a state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpuckpt.arrays import Tensor, look
from gpuckpt.devices import Devices
from gpuckpt.errors import InvalidError, UnsupportedError
from gpuckpt.inventory import Inventory, Snapshot
from gpuckpt.tree import Flat, Path, flatten, rebuild
from gpuckpt.values import Json, NotPlainError, encode_value

MODES = ("auto", "copy", "hold")


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
    snapshot = Snapshot(inventory, mode, [None] * len(inventory.tensors), {})
    modes = set()
    try:
        for name, positions in inventory.by_device().items():
            tensors = [inventory.tensors[position] for position in positions]
            copy = _copies(tensors, devices, name, mode=mode, host_room=host_room_nbytes)
            modes.add("copy" if copy else "hold")
            arrays = [tensor.array for tensor in tensors]
            snapshot.frozen[name] = devices[name].freeze(arrays, copy=copy)
            for position, source in zip(positions, snapshot.frozen[name].arrays, strict=True):
                snapshot.sources[position] = source
    except BaseException:
        snapshot.release()
        raise
    snapshot.mode = "hold" if "hold" in modes else "copy"
    return snapshot


def copy_nbytes(inventory: Inventory, device: str) -> int:
    """An upper bound for the bytes that a copy of one device's tensors takes."""
    positions = inventory.by_device().get(device, [])
    return sum(-(-inventory.tensors[at].spec.nbytes // 512) * 512 for at in positions)


def place(state: Any, flat: Flat, leaves: Mapping[Path, Any], objects: Mapping[Path, Any]) -> Any:
    """Put restored leaves, and whole states of objects, in their places in `state`.

    `flat` is the same state taken apart.  Arrays restored in place are in
    `leaves` as themselves.  Returns the state, or a new tuple if it was one.
    """
    inside = {leaf.path: leaf.leaf for leaf in flat.leaves}

    def new(path: Path, node: Any) -> Any:
        if path in objects:
            return objects[path]
        return leaves.get(path, inside.get(path, node))

    return rebuild(state, new, flat.opened)


def _value(leaf: Any, name: str) -> Json:
    try:
        return encode_value(leaf)
    except NotPlainError as error:
        raise UnsupportedError(
            name,
            f"{error} can't be saved; a leaf is an array, a plain value (int, float, complex, "
            "str, bytes, bool, None), or has state_dict and load_state_dict",
        ) from None


def _copies(
    tensors: Sequence[Tensor], devices: Devices, name: str, *, mode: str, host_room: int
) -> bool:
    if mode not in MODES:
        raise InvalidError(f"snapshot is one of {', '.join(MODES)}; got {mode!r}")
    if mode == "hold":
        return False
    nbytes = sum(-(-tensor.spec.nbytes // 512) * 512 for tensor in tensors)
    room = host_room if name == "cpu" else devices[name].room()
    if mode == "copy" and name == "cpu" and nbytes > room:
        raise InvalidError(
            f"snapshot='copy' needs {nbytes} bytes for host tensors, and memory= leaves {room}; "
            "raise memory, or pass snapshot='hold'"
        )
    return mode == "copy" or nbytes <= room
