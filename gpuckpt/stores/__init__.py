"""Where file bytes live: the port through which the engine reaches any storage."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

Buffer = memoryview | bytes
Bytes = npt.NDArray[np.uint8]


class Appender(Protocol):
    """A new file that is being written, from its beginning to its end."""

    @property
    def offset(self) -> int:
        """Bytes appended so far."""
        ...

    @property
    def cpu_seconds(self) -> float:
        """CPU time that threads of the store's own have spent on this file so far."""
        ...

    @property
    def waiting_nbytes(self) -> int:
        """Bytes that threads of the store's own are still to write; any thread may ask."""
        ...

    def append(self, parts: Sequence[Buffer]) -> None:
        """Write `parts` one after the other; they are the caller's again on return.

        May write later what it has taken, and raise what went wrong then.
        """
        ...

    def sync(self) -> None:
        """Make all that was appended durable; the file's name isn't yet (`sync_names`).

        After an error the file's contents can't be trusted, and a second
        `sync` would not tell: give the file up.
        """
        ...

    def close(self) -> None:
        """Let go of the file; safe to call twice.

        Without `sync` before, the file may lack its end, and isn't durable.
        """
        ...


class Store(Protocol):
    """The files of one root, under flat names.

    Contents are durable once an appender's `sync` has returned; names
    (creations, renames, removals), once `sync_names` has.  A store also either
    `Renames` or `Publishes`, for what must appear in one step.  Every method
    raises `StorageError` with the file's name where the storage refuses, and
    `NotFoundError` where a file isn't there.
    """

    @property
    def root(self) -> str:
        """What a person would call this place."""
        ...

    def create(self, name: str) -> Appender:
        """Begin a new file, which must not exist."""
        ...

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (uint8) from `offset` on; `CorruptError` if the file ends before."""
        ...

    def size(self, name: str) -> int:
        """Bytes in a file."""
        ...

    def remove(self, name: str) -> None:
        """Delete a file; nothing happens if it isn't there."""
        ...

    def names(self) -> list[str]:
        """The names of all files, sorted."""
        ...

    def sync_names(self) -> None:
        """Make all creations, renames and removals so far durable."""
        ...

    def lock(self) -> AbstractContextManager[None]:
        """Hold the root for writing; `LockedError` if somebody else does.

        A holder that dies, however it dies, holds nothing; where only time can
        tell that it has, no longer than its lease says.
        """
        ...


class Renames(Protocol):
    """A `Store` whose files can get another name."""

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, in the place of any file that has it, in one step."""
        ...


class Publishes(Protocol):
    """A `Store` without renames, in which a whole file appears by one request."""

    def publish(self, name: str, data: bytes) -> None:
        """Put a whole (small) file in the place of any that is there, in one step, durably.

        Only while the lock is held, which is seen to just before.

        Raises:
            LockedError: the lock was lost; nothing was put.
            StorageError: the storage refused.  If it is `maybe`, the file may be there all the
                same, or come to be; else it isn't.
        """
        ...


class File(Protocol):
    """A file that is open for reading, by one thread.  Raises what a `Store` does."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (uint8) from `offset` on; `CorruptError` if the file ends before."""
        ...


class Parts(File, Protocol):
    """A `File` that can bring what follows each other to several places at once."""

    def read_parts(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill buffers (uint8) one after the other, as `read_into` fills one."""
        ...


class Seeing(File, Protocol):
    """A `File` that can look at bytes while they come."""

    def read_seen(self, offset: int, room: Bytes) -> tuple[bytes, int] | None:
        """Fill `room` (uint8, contiguous), as `read_into` does, and look at it.

        The digests of its leaves (`fingerprint.leaf_digests`) and the number
        of which `fingerprint.checksum` is the hex; None: nothing was read, for
        want of the compiled loops, or of bytes.
        """
        ...


class Ahead(File, Protocol):
    """A `File` that wants to be asked for much at once, since each request takes long."""

    def expect(self, offset: int, nbytes: int) -> None:
        """Read these bytes now, and keep them for what will be asked for."""
        ...


class Opens(Protocol):
    """What a `Store` may do besides: keep a file open while parts of it are read."""

    def open(self, name: str) -> AbstractContextManager[File]:
        """Open a file until the end of the block."""
        ...


class RemovesAll(Protocol):
    """What a `Store` may do besides: remove many files sooner than one after the other."""

    def remove_all(self, names: Sequence[str]) -> None:
        """Delete files, in any order; some may have gone if this fails."""
        ...


class Measured(Protocol):
    """What a `Store` may do besides: say how much room it has."""

    def free_nbytes(self) -> int | None:
        """Bytes for which there is room, more of which surely don't fit; None if nobody knows."""
        ...


def free_nbytes(store: Store) -> int | None:
    """How much room a store has, if it says so."""
    return cast(Measured, store).free_nbytes() if hasattr(store, "free_nbytes") else None


def remove_all(store: Store, names: Sequence[str]) -> None:
    """Delete files, in any order, as fast as the store can; some may have gone if this fails."""
    if hasattr(store, "remove_all"):
        cast(RemovesAll, store).remove_all(names)
        return
    for name in names:
        store.remove(name)


def read_all(store: Store, name: str, nbytes: int | None = None) -> bytes:
    """A whole (small) file, or the first so many bytes, if somebody has asked for its size."""
    buffer = bytearray(store.size(name) if nbytes is None else nbytes)
    store.read_into(name, 0, memoryview(buffer))
    return bytes(buffer)


def write_all(store: Store, name: str, data: bytes) -> None:
    """Write a whole (small) file in the place of any that is there, contents durable on return."""
    store.remove(name)
    file = store.create(name)
    try:
        file.append([data])
        file.sync()
    finally:
        file.close()
