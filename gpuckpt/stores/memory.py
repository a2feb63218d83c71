"""Files in a dictionary: for tests and examples."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

from gpuckpt.errors import CorruptError, LockedError, NotFoundError, StorageError
from gpuckpt.stores import Buffer


class MemoryStore:
    """A `Store` whose files live as long as it does."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.files = {name: bytearray(data) for name, data in (files or {}).items()}
        self._writer = threading.Lock()

    @property
    def root(self) -> str:
        """What a person would call this place."""
        return "memory"

    def create(self, name: str) -> MemoryAppender:
        """Begin a new file, which must not exist."""
        if name in self.files:
            raise StorageError(f"can't create {name}: it exists")
        self.files[name] = bytearray()
        return MemoryAppender(self.files[name])

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on."""
        data = self._file(name)[offset : offset + buffer.nbytes]
        if len(data) < buffer.nbytes:
            raise CorruptError(name, f"ends at {offset + len(data)}")
        buffer[:] = data

    def size(self, name: str) -> int:
        """Bytes in a file."""
        return len(self._file(name))

    def rename(self, old: str, new: str) -> None:
        """Give a file another name."""
        self.files[new] = self._file(old)
        del self.files[old]

    def remove(self, name: str) -> None:
        """Delete a file; nothing happens if it isn't there."""
        self.files.pop(name, None)

    def names(self) -> list[str]:
        """The names of all files, sorted."""
        return sorted(self.files)

    def sync_names(self) -> None:
        """Nothing: memory has no other kind of durability."""

    def free_nbytes(self) -> int | None:
        """Nobody knows."""
        return None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the files for writing."""
        if not self._writer.acquire(blocking=False):
            raise LockedError("another writer has these files")
        try:
            yield
        finally:
            self._writer.release()

    def _file(self, name: str) -> bytearray:
        try:
            return self.files[name]
        except KeyError:
            raise NotFoundError(f"{name}: there is no such file") from None


class MemoryAppender:
    """A new file of a `MemoryStore`."""

    cpu_seconds = 0.0
    waiting_nbytes = 0

    def __init__(self, data: bytearray) -> None:
        self._data = data

    @property
    def offset(self) -> int:
        """Bytes appended so far."""
        return len(self._data)

    def append(self, parts: Sequence[Buffer]) -> None:
        """Write `parts` one after the other."""
        for part in parts:
            self._data += part

    def sync(self) -> None:
        """Nothing: memory has no other kind of durability."""

    def close(self) -> None:
        """Nothing to let go of."""
