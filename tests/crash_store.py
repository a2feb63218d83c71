"""A store that loses power, and then yields every file system that a reboot could find.

Modelled after leveldb's FaultInjectionTestEnv and pebble's crashable MemFS, but
exhaustive: every subset of the unsynced name changes, and for each file that
was not synced its old contents, its new ones, a torn half of these, or zeros
of their length (the length was written, the data wasn't).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import product

from gpuckpt.errors import CorruptError, NotFoundError, StorageError


class PowerLossError(Exception):
    """The simulated machine lost power; nothing works any more."""


class _File:
    def __init__(self, data: bytes = b"") -> None:
        self.data, self.synced = data, data

    def after_reboot(self) -> list[bytes]:
        """What may be left of it, each possibility once."""
        if self.data == self.synced:
            return [self.data]
        missing = len(self.data) - len(self.synced)
        torn = self.synced + self.data[len(self.synced) :][: missing // 2]
        zeros = self.synced + bytes(missing)
        return list(dict.fromkeys([self.synced, self.data, torn, zeros]))


class CrashStore:
    """An in-memory store that loses power before operation number `crash_before`.

    `deaf_sync` is the number of one sync call (of either kind) that claims to
    have been made and wasn't: for tests of the tests.  `failing_sync` is the
    number of one that raises.
    """

    root = "crash"

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.crash_before: int | None = None
        self.deaf_sync: int | None = None
        self.failing_sync: int | None = None
        self.operations = self.syncs = 0
        self._live = {name: _File(data) for name, data in (files or {}).items()}
        self._durable = dict(self._live)
        self._pending: list[dict[str, _File | None]] = []

    def create(self, name: str) -> _Appender:
        self._operation()
        if name in self._live:
            raise StorageError(f"can't create {name}: it exists")
        file = _File()
        self._change({name: file})
        return _Appender(self, file)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        data = self._file(name).data[offset : offset + buffer.nbytes]
        if len(data) < buffer.nbytes:
            raise CorruptError(name, f"ends at {offset + len(data)}")
        buffer[:] = data

    def size(self, name: str) -> int:
        return len(self._file(name).data)

    def rename(self, old: str, new: str) -> None:
        self._operation()
        self._change({old: None, new: self._file(old)})

    def remove(self, name: str) -> None:
        if name in self._live:
            self._operation()
            self._change({name: None})

    def names(self) -> list[str]:
        return sorted(self._live)

    def sync_names(self) -> None:
        self._operation()
        if self.hears():
            self._durable, self._pending = dict(self._live), []

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        yield

    def reboots(self) -> Iterator[CrashStore]:
        """Every store that a reboot could find."""
        for kept in product((False, True), repeat=len(self._pending)):
            names = dict(self._durable)
            for change, keep in zip(self._pending, kept, strict=True):
                if keep:
                    _apply(names, change)
            for contents in product(*(file.after_reboot() for file in names.values())):
                yield CrashStore(dict(zip(names, contents, strict=True)))

    def hears(self) -> bool:
        """Count a sync call; False for the one that is deaf, an error for the one that fails."""
        self.syncs += 1
        if self.syncs - 1 == self.failing_sync:
            raise StorageError("can't sync: input/output error")
        return self.syncs - 1 != self.deaf_sync

    def _operation(self) -> None:
        if self.operations == self.crash_before:
            raise PowerLossError
        self.operations += 1

    def _file(self, name: str) -> _File:
        try:
            return self._live[name]
        except KeyError:
            raise NotFoundError(f"{name}: there is no such file") from None

    def _change(self, change: dict[str, _File | None]) -> None:
        self._pending.append(change)
        _apply(self._live, change)


class _Appender:
    cpu_seconds = 0.0
    waiting_nbytes = 0

    def __init__(self, store: CrashStore, file: _File) -> None:
        self._store, self._file = store, file

    @property
    def offset(self) -> int:
        return len(self._file.data)

    def append(self, parts: Sequence[memoryview | bytes]) -> None:
        self._store._operation()
        self._file.data += b"".join(parts)

    def sync(self) -> None:
        self._store._operation()
        if self._store.hears():
            self._file.synced = self._file.data

    def close(self) -> None:
        pass


def _apply(names: dict[str, _File], change: dict[str, _File | None]) -> None:
    for name, file in change.items():
        if file is None:
            names.pop(name, None)
        else:
            names[name] = file
