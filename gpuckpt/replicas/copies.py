"""Copies of files that others have, in a store of one's own.

1. Each data file, under a temporary name, synced, renamed.   A name that is there is whole.
2. Sync the names.               No manifest may point at what a crash can take away.
3. Manifests, in the same way.
4. Sync the names.               Only now is the copy one.
5. Remove what isn't wanted any more: manifests, then, the names synced, data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

from gpuckpt import layout
from gpuckpt.errors import CheckpointError
from gpuckpt.replicas.shelf import Item, items_of
from gpuckpt.stores import Renames, Store, remove_all

Fetch = Callable[[Item], Iterator[memoryview]]


def bring(store: Store, wanted: Iterable[Item], fetch: Fetch) -> list[str]:
    """Copy what isn't there, manifests last; the names of it, durable on return.

    Raises:
        CheckpointError: what `fetch` raises, or the store; what was begun is
            taken up by the next call.
    """
    missing = _missing(store, wanted)
    for these in (
        [item for item in missing if not item.is_manifest],
        [item for item in missing if item.is_manifest],
    ):
        for item in these:
            _copy(store, item, fetch(item))
        if these:
            store.sync_names()
    return [item.name for item in missing]


def drop(store: Store, names: Sequence[str]) -> None:
    """Remove files, so that no manifest is ever there without its data."""
    manifests = [name for name in names if layout.manifest_step(name) is not None]
    for name in manifests:
        store.remove(name)
    if manifests:
        store.sync_names()
    remove_all(store, [name for name in names if name not in manifests])


def tidy(store: Store) -> None:
    """Remove what a crash has left half copied."""
    for name in store.names():
        if name.startswith(layout.BEGINNING) and name.endswith(layout.TEMPORARY):
            store.remove(name)


def _missing(store: Store, wanted: Iterable[Item]) -> list[Item]:
    there = set(store.names())
    return [
        item
        for item in dict.fromkeys(wanted)
        if item.name not in there or [item] != items_of(store, [item.name])
    ]


def _copy(store: Store, item: Item, parts: Iterable[memoryview]) -> None:
    temporary = item.name + layout.TEMPORARY
    store.remove(temporary)
    file = store.create(temporary)
    try:
        for part in parts:
            file.append([part])
        file.sync()
        file.close()
        cast(Renames, store).rename(temporary, item.name)
    except BaseException:
        for undo in (file.close, lambda: store.remove(temporary)):
            with contextlib.suppress(CheckpointError):
                undo()
        raise
