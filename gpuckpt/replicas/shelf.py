"""Files of a store that others may have: which, how long, and, of manifests, what is in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gpuckpt import layout
from gpuckpt.errors import CorruptError
from gpuckpt.fingerprint import checksum128
from gpuckpt.replicas.ring import rank_of
from gpuckpt.stores import Store, read_all


@dataclass(frozen=True, slots=True)
class Item:
    """A file.  `check` tells two manifests of one step apart; no other file's name comes twice."""

    name: str
    nbytes: int
    check: str = ""

    @property
    def is_manifest(self) -> bool:
        """Whether it commits a step."""
        return layout.manifest_step(self.name) is not None


def items_of(store: Store, names: Iterable[str]) -> list[Item]:
    """What files are there; manifests are read."""
    return [Item(name, store.size(name), _check(store, name)) for name in names]


def every_item(store: Store) -> list[Item]:
    """All files of checkpoints."""
    return items_of(store, [name for name in store.names() if is_file(name)])


def is_file(name: object) -> bool:
    """Whether it is the name of a file of a checkpoint, which holds no path."""
    if not isinstance(name, str) or "/" in name or name.endswith(layout.TEMPORARY):
        return False
    return layout.manifest_step(name) is not None or rank_of(name) is not None


def pack_items(items: Iterable[Item]) -> list[list[Any]]:
    """As JSON."""
    return [[item.name, item.nbytes, item.check] for item in items]


def unpack_items(rows: Any, where: str) -> list[Item]:
    """Undoes `pack_items`, trusting nothing.

    Raises:
        CorruptError: these aren't items.
    """
    try:
        found = [Item(name, nbytes, check) for name, nbytes, check in rows]
    except (TypeError, ValueError) as error:
        raise CorruptError(where, f"not a list of files ({error})") from error
    for item in found:
        sound = is_file(item.name) and type(item.nbytes) is int and item.nbytes >= 0
        if not sound or not isinstance(item.check, str):
            raise CorruptError(where, f"{item.name!r} isn't a file of a checkpoint")
    return found


def parts_of(store: Store, item: Item, room: memoryview) -> Iterator[memoryview]:
    """A file's bytes, as much as there is room for at a time."""
    for at in range(0, item.nbytes, room.nbytes):
        part = room[: min(room.nbytes, item.nbytes - at)]
        store.read_into(item.name, at, part)
        yield part


def _check(store: Store, name: str) -> str:
    return checksum128(read_all(store, name)) if layout.manifest_step(name) is not None else ""
