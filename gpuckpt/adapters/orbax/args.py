"""What is saved and restored, and how: the counterparts of `orbax.checkpoint.args`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StandardSave:
    """Save a pytree."""

    item: Any


@dataclass(frozen=True)
class StandardRestore:
    """Restore a pytree like `item`; without one, as nested dicts and lists."""

    item: Any = None
    strict: bool = True


@dataclass(frozen=True)
class PyTreeSave:
    """Save a pytree."""

    item: Any


@dataclass(frozen=True)
class PyTreeRestore:
    """Restore a pytree like `item`; without one, as nested dicts and lists.

    `restore_args` is a tree like `item`, with a `sharding` in its leaves.
    """

    item: Any = None
    restore_args: Any = None
    partial_restore: bool = False


@dataclass(frozen=True)
class ArraySave:
    """Save one array, or a number."""

    item: Any


@dataclass(frozen=True)
class ArrayRestore:
    """Restore one array like `item`."""

    item: Any = None


@dataclass(frozen=True)
class JaxRandomKeySave:
    """Save an array of random keys."""

    item: Any


@dataclass(frozen=True)
class JaxRandomKeyRestore:
    """Restore an array of random keys."""

    item: Any = None


@dataclass(frozen=True)
class JsonSave:
    """Save what can be written as JSON."""

    item: Any


@dataclass(frozen=True)
class JsonRestore:
    """Restore what was saved as JSON."""

    item: Any = None


class Composite(Mapping[str, Any]):
    """Several items by name: to save, to restore, or restored."""

    def __init__(self, **items: Any) -> None:
        """`Composite(state=StandardSave(state), meta=JsonSave(meta))`."""
        self._items = items

    def __getitem__(self, name: str) -> Any:
        """An item."""
        return self._items[name]

    def __getattr__(self, name: str) -> Any:
        """An item."""
        if name.startswith("_") or name not in self._items:
            raise AttributeError(f"no item is called {name!r}; there are {sorted(self._items)}")
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        """The names of all."""
        return iter(self._items)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._items)

    def __repr__(self) -> str:
        """As it is made."""
        return f"Composite({', '.join(f'{name}={item!r}' for name, item in self._items.items())})"
