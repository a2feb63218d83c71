"""A store that records what is done to it, and every file system that a loss of power could leave.

Modelled after leveldb's FaultInjectionTestEnv and pebble's crashable MemFS, but
exhaustive: every subset of the unsynced name changes, and for each file that
was not synced its old contents, its new ones, a torn half of these, zeros of
their length (the length was written, the data wasn't), or zeros before the
later half (later blocks were written before earlier ones).

A history is run once; its record is then cut off before each operation, and
read again without one of its syncs.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from gpuckpt.errors import CorruptError, NotFoundError, StorageError

Image = tuple[tuple[str, bytes], ...]
"""What a reboot finds: names, sorted, with contents."""
Promise = frozenset[tuple[int, int]]
"""Steps that were said to be durable, each with its version or a later one."""
Kind = Literal["create", "append", "sync", "rename", "remove", "sync_names", "promise"]


class DeadError(Exception):
    """The simulated process is dead; nothing works any more."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What was done to a store: `file` is a number, for names come and go."""

    kind: Kind
    name: str = ""
    new: str = ""
    file: int = -1
    data: bytes = b""
    promise: Promise = frozenset()
    place: tuple[str, int] = ("", 0)
    """Of a sync: the source file and line that asked for it."""
    client: int = 0
    """Of a shared file system that one syncs only the names that it changed itself."""

    @property
    def is_sync(self) -> bool:
        """Whether it makes something durable."""
        return self.kind in {"sync", "sync_names"}


@dataclass(frozen=True, slots=True)
class Loss:
    """What a reboot found after a loss of power, what had been promised, and what would be next."""

    image: Image
    promise: Promise
    next: Promise


class _File:
    def __init__(self, data: bytes = b"") -> None:
        self.data, self.synced = data, data

    def after_reboot(self) -> list[bytes]:
        """What may be left of it, each possibility once."""
        if self.data == self.synced:
            return [self.data]
        new = self.data[len(self.synced) :]
        early, late = new[: len(new) // 2], new[len(new) // 2 :]
        found = [b"", new, early, bytes(len(new)), bytes(len(early)) + late]
        return list(dict.fromkeys(self.synced + one for one in found))


class Disk:
    """Files, and what of them and of their names is durable."""

    def __init__(self, image: Image = ()) -> None:
        self.live = {name: _File(data) for name, data in image}
        self._durable = dict(self.live)
        self._pending: list[tuple[int, dict[str, _File | None]]] = []
        self._files: dict[int, _File] = {}

    def apply(self, operation: Operation) -> None:
        """Do it again."""
        kind, name = operation.kind, operation.name
        if kind == "create":
            self._files[operation.file] = _File()
            self._change(operation, {name: self._files[operation.file]})
        elif kind == "append":
            self._files[operation.file].data += operation.data
        elif kind == "sync":
            file = self._files[operation.file]
            file.synced = file.data
        elif kind == "rename":
            self._change(operation, {name: None, operation.new: self.live[name]})
        elif kind == "remove":
            self._change(operation, {name: None})
        elif kind == "sync_names":
            self._sync_names(operation.client)

    def has_unsynced(self, sync: Operation) -> bool:
        """Whether a sync has anything to do."""
        if sync.kind == "sync_names":
            return any(client == sync.client for client, _ in self._pending)
        return self._files[sync.file].data != self._files[sync.file].synced

    def reboots(self) -> Iterator[Image]:
        """Every file system that a reboot could find, some of them more than once."""
        for kept in product((False, True), repeat=len(self._pending)):
            names = dict(self._durable)
            for (_, change), keep in zip(self._pending, kept, strict=True):
                if keep:
                    _apply(names, change)
            order = sorted(names)
            for contents in product(*(names[name].after_reboot() for name in order)):
                yield tuple(zip(order, contents, strict=True))

    def _change(self, operation: Operation, change: dict[str, _File | None]) -> None:
        self._pending.append((operation.client, change))
        _apply(self.live, change)

    def _sync_names(self, client: int) -> None:
        """What a client changed is durable, and what others did before with the same names."""
        durable: list[dict[str, _File | None]] = []
        left: list[tuple[int, dict[str, _File | None]]] = []
        names: set[str] = set()
        for one, change in reversed(self._pending):
            if one == client or names & change.keys():
                names |= change.keys()
                durable.append(change)
            else:
                left.append((one, change))
        for change in reversed(durable):
            _apply(self._durable, change)
        self._pending = left[::-1]


class CrashStore:
    """An in-memory store that records its operations.

    `refuses` is asked before each, and may raise an error in its place;
    `kills` is asked, too, and if it says so the process dies: this operation
    and all that follow raise `DeadError`, until `revive`.
    """

    root = "crash"

    def __init__(self, image: Image = ()) -> None:
        self.record: list[Operation] = []
        self.refuses: Callable[[Operation], object] = lambda _: None
        self.kills: Callable[[Operation], bool] = lambda _: False
        self._disk, self._dead = Disk(image), False
        self._numbers = itertools.count(1)
        self.client = 0
        self._writer = threading.Lock()
        self.free: int | None = None

    def create(self, name: str) -> _Appender:
        if name in self._disk.live:
            raise StorageError(f"can't create {name}: it exists")
        number = next(self._numbers)
        self.do(Operation("create", name, file=number))
        return _Appender(self, number)

    def of_client(self, client: int) -> CrashStore:
        """The same store, as another machine has it, which may die, or be refused, by itself."""
        found = copy.copy(self)
        found.client, found.refuses, found.kills = client, lambda _: None, lambda _: False
        return found

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        data = self._file(name).data[offset : offset + buffer.nbytes]
        if len(data) < buffer.nbytes:
            raise CorruptError(name, f"ends at {offset + len(data)}")
        buffer[:] = data

    def size(self, name: str) -> int:
        return len(self._file(name).data)

    def rename(self, old: str, new: str) -> None:
        self._file(old)
        self.do(Operation("rename", old, new))

    def remove(self, name: str) -> None:
        if name in self._disk.live:
            self.do(Operation("remove", name))

    def names(self) -> list[str]:
        return sorted(self._disk.live)

    def sync_names(self) -> None:
        self.do(Operation("sync_names", place=_asked_at()))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        yield

    def promise(self, promise: Promise) -> None:
        """From here on this must be there after a loss of power."""
        self.record.append(Operation("promise", promise=promise))

    def revive(self) -> None:
        """Another process goes on with what the dead one has left, unsynced as it is."""
        self._dead, self.kills = False, lambda _: False

    def do(self, operation: Operation) -> None:
        """Do it and record it, if the process is alive."""
        operation = replace(operation, client=self.client)
        self._dead = self._dead or self.kills(operation)
        if self._dead:
            raise DeadError
        self.refuses(operation)
        self._disk.apply(operation)
        self.record.append(operation)

    def check(self) -> None:
        """Raise if the process is dead."""
        if self._dead:
            raise DeadError

    def free_nbytes(self) -> int | None:
        """What the disk says it has left."""
        return self.free

    def image(self) -> Image:
        """What a process finds, for which unsynced files are as good as others."""
        return tuple((name, self._disk.live[name].data) for name in self.names())

    def _file(self, name: str) -> _File:
        try:
            return self._disk.live[name]
        except KeyError:
            raise NotFoundError(f"{name}: there is no such file") from None


class _Appender:
    cpu_seconds = 0.0
    waiting_nbytes = 0

    def __init__(self, store: CrashStore, file: int) -> None:
        self._store, self._number, self.offset = store, file, 0

    def append(self, parts: Sequence[memoryview | bytes]) -> None:
        data = b"".join(parts)
        self._store.do(Operation("append", file=self._number, data=data))
        self.offset += len(data)

    def sync(self) -> None:
        self._store.do(Operation("sync", file=self._number, place=_asked_at()))

    def close(self) -> None:
        pass


def losses(
    record: Sequence[Operation], begin: int = 0, *, image: Image = (), deaf: int | None = None
) -> Iterator[Loss]:
    """What losses of power may leave before each operation from `begin` on and after the last.

    Each once.  The sync at `deaf` is left out: it claimed to have been made.
    """
    disk, promise = Disk(image), Promise()
    promises = [one.promise for one in record if one.kind == "promise"]
    seen: set[Loss] = set()
    for at in range(len(record) + 1):
        for found in disk.reboots() if at >= begin else ():
            loss = Loss(found, promise, promises[0] if promises else promise)
            if loss not in seen:
                seen.add(loss)
                yield loss
        if at < len(record) and record[at].kind == "promise":
            promise = promises.pop(0)
        elif at < len(record) and at != deaf:
            disk.apply(record[at])


def syncs(record: Sequence[Operation], *, image: Image = ()) -> Iterator[int]:
    """Where in a record there are syncs that had something to do."""
    disk = Disk(image)
    for at, operation in enumerate(record):
        if operation.is_sync and disk.has_unsynced(operation):
            yield at
        disk.apply(operation)


def _apply(names: dict[str, _File], change: dict[str, _File | None]) -> None:
    for name, file in change.items():
        if file is None:
            names.pop(name, None)
        else:
            names[name] = file


def _asked_at() -> tuple[str, int]:
    frame = sys._getframe(2)
    return frame.f_code.co_filename, frame.f_lineno
