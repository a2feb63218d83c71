"""A store that counts what is asked of it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import cast

from gpuckpt.errors import NotFoundError
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


class Made:
    """Files that are made when they are read, the latest few of them kept; not to be written."""

    root = "memory"

    def __init__(self, files: dict[str, bytes], make: Callable[[str], bytes | None]) -> None:
        """`make` gives the contents of all others that there are."""
        self._files, self._make = files, make
        self._last = "", b""

    def size(self, name: str) -> int:
        return len(self._file(name))

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._file(name)[offset : offset + buffer.nbytes]

    def names(self) -> list[str]:
        return sorted(self._files)

    def create(self, name: str) -> Appender:
        raise AssertionError(name)

    def rename(self, old: str, new: str) -> None:
        raise AssertionError(old, new)

    def remove(self, name: str) -> None:
        raise AssertionError(name)

    def sync_names(self) -> None:
        raise AssertionError

    def lock(self) -> AbstractContextManager[None]:
        raise AssertionError

    def _file(self, name: str) -> bytes:
        if name in self._files:
            return self._files[name]
        if self._last[0] != name:
            data = self._make(name)
            if data is None:
                raise NotFoundError(name)
            self._last = name, data
        return self._last[1]
