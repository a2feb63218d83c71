"""Disks that fail: a store whose n-th operation does, a store that gets full, a system that fails.

All are real: what a `Fault` doesn't strike is done, in memory or in a directory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gpuckpt.errors import StorageError
from gpuckpt.stores import Appender
from gpuckpt.stores.blocks import ALIGNMENT
from gpuckpt.stores.memory import MemoryAppender, MemoryStore

# What becomes of an operation that is reported as failed.
REFUSED, DONE, TORN = "refused", "done all the same", "done by half"
HOWS = (REFUSED, DONE, TORN)
CODES = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)


def refusal(code: int, what: str) -> StorageError:
    error = StorageError(f"can't {what}: {os.strerror(code)}; see to the disk")
    error.errno = code
    return error


@dataclass
class Fault:
    """Strikes operation number `at` of those that begin with `only`, once it is armed."""

    at: int
    code: int = errno.EIO
    how: str = REFUSED
    only: str = ""
    struck: str = ""

    def strikes(self, what: str) -> bool:
        if not what.startswith(self.only):
            return False
        self.at -= 1
        if self.at == -1:
            self.struck = what
        return self.at == -1


class FaultyStore:
    """A store of whose operations one fails, as a `Fault` says, once it is armed.

    After a sync that failed, what wasn't durable has gone from the page cache:
    it reads as zeros, and to sync again is of no use.
    """

    def __init__(self, inner: MemoryStore | None = None) -> None:
        self.inner = inner or MemoryStore()
        self.fault: Fault | None = None
        self.operations: list[str] = []

    @property
    def root(self) -> str:
        return "faulty"

    def create(self, name: str) -> Appender:
        with self.struck(f"create {name}", lambda: self.inner.create(name)):
            return _FaultyAppender(self, name, self.inner.create(name))

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        with self.struck(f"read {name}"):
            self.inner.read_into(name, offset, buffer)

    def size(self, name: str) -> int:
        with self.struck(f"size {name}"):
            return self.inner.size(name)

    def rename(self, old: str, new: str) -> None:
        with self.struck(f"rename {old}", lambda: self.inner.rename(old, new)):
            self.inner.rename(old, new)

    def remove(self, name: str) -> None:
        with self.struck(f"remove {name}", lambda: self.inner.remove(name)):
            self.inner.remove(name)

    def names(self) -> list[str]:
        with self.struck("list"):
            return self.inner.names()

    def sync_names(self) -> None:
        with self.struck("sync the names"):
            self.inner.sync_names()

    def lock(self) -> AbstractContextManager[None]:
        with self.struck("lock"):
            return self.inner.lock()

    @contextlib.contextmanager
    def struck(
        self, what: str, do: Callable[[], object] = lambda: None, half: Callable[[], object] = bool
    ) -> Iterator[None]:
        """Fail in the place of the block, if it is this one's turn."""
        self.operations.append(what)
        fault = self.fault
        if fault is None or not fault.strikes(what):
            yield
            return
        with contextlib.suppress(StorageError):
            {REFUSED: bool, DONE: do, TORN: half}[fault.how]()
        raise refusal(fault.code, what)


class _FaultyAppender:
    cpu_seconds = 0.0
    waiting_nbytes = 0

    def __init__(self, store: FaultyStore, name: str, inner: MemoryAppender) -> None:
        self._store, self._name, self._inner = store, name, inner
        self._synced = 0
        self._lost = False

    @property
    def offset(self) -> int:
        return self._inner.offset

    def append(self, parts: Sequence[memoryview | bytes]) -> None:
        whole = b"".join(parts)
        with self._store.struck(
            f"append to {self._name}",
            lambda: self._inner.append([whole]),
            lambda: self._inner.append([whole[: len(whole) // 2]]),
        ):
            self._inner.append(parts)

    def sync(self) -> None:
        assert not self._lost, f"{self._name} is synced once more after that has failed"
        try:
            with self._store.struck(f"sync {self._name}"):
                self._synced = self.offset
        except StorageError:
            self._lost = True
            data = self._store.inner.files[self._name]
            data[self._synced :] = bytes(len(data) - self._synced)
            raise

    def close(self) -> None:
        with self._store.struck(f"close {self._name}"):
            self._inner.close()


class SmallStore(MemoryStore):
    """A store with room for so many bytes; what doesn't fit is written as far as it does."""

    def __init__(self, nbytes: int, *, says: bool = True, code: int = errno.ENOSPC) -> None:
        """`says` whether it knows beforehand what is left; `code` what it says when it is full."""
        super().__init__()
        self.nbytes, self.says, self.code = nbytes, says, code

    @property
    def left(self) -> int:
        return self.nbytes - sum(map(len, self.files.values()))

    def free_nbytes(self) -> int | None:
        return max(self.left, 0) if self.says else None

    def create(self, name: str) -> MemoryAppender:
        super().create(name)
        return _SmallAppender(self, name)


class _SmallAppender(MemoryAppender):
    def __init__(self, store: SmallStore, name: str) -> None:
        super().__init__(store.files[name])
        self._store, self._name = store, name

    def append(self, parts: Sequence[memoryview | bytes]) -> None:
        whole = b"".join(parts)
        room = max(self._store.left, 0)
        super().append([whole[:room]])
        if room < len(whole):
            raise refusal(self._store.code, f"write {self._name}")


class System:
    """The system's calls about one directory, of which one fails, once a `Fault` is armed."""

    CALLS = (
        *("open", "pwritev", "pwrite", "preadv", "pread", "fsync", "close", "replace", "unlink"),
        *("scandir", "mkdir", "stat", "statvfs", "ftruncate", "posix_fadvise"),
    )

    # Over a network these may be made, and the answer be lost.
    NAMING = ("replace", "unlink", "mkdir", "pwritev", "ftruncate")

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.fault = root, Fault(-1)
        self.calls: list[str] = []
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name)))
        for name in ("flock", "fcntl"):
            monkeypatch.setattr(fcntl, name, self._wrapped(name, getattr(fcntl, name)))

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(target: Any, *arguments: Any, **options: Any) -> Any:
            if not self._concerned(target):
                return call(target, *arguments, **options)
            self.calls.append(name)
            if not self.fault.strikes(name):
                return call(target, *arguments, **options)
            if name == "close" or (self.fault.how == DONE and name in self.NAMING):
                call(target, *arguments, **options)
            if self.fault.how == TORN and name == "pwritev":
                first = arguments[0][0]  # of direct writes, aligned parts
                call(target, [first[: first.nbytes // 2 // ALIGNMENT * ALIGNMENT]], *arguments[1:])
            raise OSError(self.fault.code, os.strerror(self.fault.code))

        return wrapped

    def _concerned(self, target: Any) -> bool:
        if isinstance(target, int):
            with contextlib.suppress(OSError):
                target = Path(f"/proc/self/fd/{target}").readlink()
        return str(target).startswith(str(self.root))
