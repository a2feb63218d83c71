"""A store that counts what is asked of it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import cast

from gpuckpt.stores import Appender, Renames, Store

# Names that a request of an object store lists.
PAGE = 1000


class Counted:
    """Another `Store`, and how often each of its methods was called; `pages` are of lists."""

    def __init__(self, store: Store) -> None:
        self.store, self.calls = store, Counter[str]()
        self.read_nbytes = 0

    @property
    def root(self) -> str:
        return self.store.root

    def create(self, name: str) -> Appender:
        self.calls["create"] += 1
        return self.store.create(name)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.calls["read"] += 1
        self.read_nbytes += buffer.nbytes
        self.store.read_into(name, offset, buffer)

    def size(self, name: str) -> int:
        self.calls["size"] += 1
        return self.store.size(name)

    def rename(self, old: str, new: str) -> None:
        self.calls["rename"] += 1
        cast(Renames, self.store).rename(old, new)

    def remove(self, name: str) -> None:
        self.calls["remove"] += 1
        self.store.remove(name)

    def names(self) -> list[str]:
        found = self.store.names()
        self.calls["list"] += 1
        self.calls["pages"] += -(-len(found) // PAGE)
        return found

    def sync_names(self) -> None:
        self.calls["sync_names"] += 1
        self.store.sync_names()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        with self.store.lock():
            yield
