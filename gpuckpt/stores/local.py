"""Files of a local (or mounted) directory: the only module that talks to the file system."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpuckpt.errors import LockedError, StorageError
from gpuckpt.layout import LOCK
from gpuckpt.stores import Buffer
from gpuckpt.stores.blocks import Blocks
from gpuckpt.stores.cached import CachedFile
from gpuckpt.stores.direct import DirectFile
from gpuckpt.stores.opened import LocalFile
from gpuckpt.stores.refusals import told
from gpuckpt.stores.regular import check_regular, open_file
from gpuckpt.stores.room import free_nbytes

log = logging.getLogger("gpuckpt")


class LocalStore:
    """A directory as a `Store`; made, with its parents, when `create` or `lock` first needs it."""

    def __init__(self, root: str | os.PathLike[str], *, blocks: Blocks | None = None) -> None:
        """`blocks` is memory for writing long files, 16 MiB unless given."""
        self._path = Path(root).expanduser().absolute()
        self.blocks = Blocks() if blocks is None else blocks

    @property
    def root(self) -> str:
        """The directory's absolute path."""
        return str(self._path)

    def create(self, name: str) -> LocalAppender:
        """Begin a new file, which must not exist."""
        self._make_directory()
        self.blocks = self.blocks.here()
        return LocalAppender(self._path / name, self.blocks)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on."""
        with self.open(name) as file:
            file.read_into(offset, buffer)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[LocalFile]:
        """Open a file until the end of the block."""
        path = self._path / name
        with told(path, "read"):
            descriptor = open_file(path, os.O_RDONLY)
        try:
            yield LocalFile(path, descriptor)
        finally:
            _close(descriptor)

    def size(self, name: str) -> int:
        """Bytes in a file."""
        path = self._path / name
        with told(path, "read"):
            found = path.lstat()
        check_regular(path, found.st_mode)
        return found.st_size

    def rename(self, old: str, new: str) -> None:
        """Give a file another name."""
        with told(self._path / old, "rename"):
            (self._path / old).replace(self._path / new)

    def remove(self, name: str) -> None:
        """Delete a file; nothing happens if it isn't there."""
        with told(self._path / name, "remove"):
            (self._path / name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """The names of all files, sorted; none if the directory isn't there.

        And of links, pipes and devices: who opens one is told.
        """
        with told(self._path, "list"):
            try:
                with os.scandir(self._path) as entries:
                    return sorted(e.name for e in entries if not e.is_dir(follow_symlinks=False))
            except FileNotFoundError:
                return []

    def sync_names(self) -> None:
        """Make all creations, renames and removals so far durable."""
        with told(self._path, "sync"):
            _sync_directory(self._path)

    def free_nbytes(self) -> int | None:
        """Bytes that the file system has left; None where that doesn't say how much fits."""
        with contextlib.suppress(OSError):
            return free_nbytes(self._path)
        return None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the root by `flock`, which the kernel gives back when its holder dies.

        A forked child inherits the descriptor, and would hold the lock after
        its parent's death; so it closes its copy first thing.
        """
        self._make_directory()
        path = self._path / LOCK
        with told(path, "lock"):
            descriptor = open_file(path, os.O_RDWR | os.O_CREAT)
        held = _Held(descriptor)
        try:
            with told(path, "lock"):
                self._take(descriptor, path)
            os.register_at_fork(after_in_child=held.close)
            yield
        finally:
            held.close()

    def _take(self, descriptor: int, path: Path) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(
                f"{path}: another writer has this root ({_owner(descriptor)}); "
                "stop it or wait for it, or give this run a root of its own"
            ) from None
        if os.fstat(descriptor).st_nlink > 1:
            return  # a copy by hard links shares it, or it is a stranger's: don't write to it
        # Only for people to read: a full disk, which has no room for it, may be locked too.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _make_directory(self) -> None:
        """Make the root and those parents that are missing, each durable in its own parent."""
        with told(self._path, "create"):
            missing = [path for path in (self._path, *self._path.parents) if not path.exists()]
            for path in reversed(missing):
                path.mkdir(exist_ok=True)
                try:
                    _sync_directory(path.parent)
                except OSError:
                    with contextlib.suppress(OSError):
                        path.rmdir()  # else it would be there, and nobody would sync it again
                    raise


def sync_tree(top: Path) -> None:
    """Make a directory durable with all that is in it; its own name isn't yet.

    Raises:
        StorageError: the storage refused.
    """
    for folder, _, names in os.walk(top, topdown=False):
        for name in names:
            path = Path(folder, name)
            with told(path, "sync"):
                descriptor = open_file(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        with told(Path(folder), "sync"):
            _sync_directory(Path(folder))


def overwrite(path: Path, data: bytes) -> None:
    """Put bytes in the place of a file's first ones, durably.

    Raises:
        StorageError: the storage refused.
    """
    with told(path, "write"):
        descriptor = open_file(path, os.O_WRONLY)
        try:
            at = 0
            while at < len(data):
                at += os.pwrite(descriptor, data[at:], at)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _Held:
    """A descriptor that is closed once, whoever comes first."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            _close(descriptor)


class LocalAppender:
    """A new file of a `LocalStore`: its beginning through the page cache, the rest directly."""

    def __init__(self, path: Path, blocks: Blocks) -> None:
        """`blocks` are the store's, for the direct writes of one file at a time."""
        self._path, self._blocks = path, blocks
        self._given_up: StorageError | None = None
        with told(path, "create"):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor: int | None = os.open(path, flags, 0o666)
        self._file: CachedFile | DirectFile = CachedFile(self._descriptor, 0)

    @property
    def offset(self) -> int:
        """Bytes appended so far."""
        return self._file.offset

    @property
    def cpu_seconds(self) -> float:
        """CPU time of the store's own thread for this file, so far."""
        return self._file.cpu_seconds

    @property
    def waiting_nbytes(self) -> int:
        """Bytes in full blocks that aren't written yet; none of what is in the page cache."""
        return self._file.waiting_nbytes

    def append(self, parts: Sequence[Buffer]) -> None:
        """Write `parts` one after the other, or gather them for a write that comes later.

        Waits for the disk if several blocks wait for it.  An error of an
        earlier part's write may be raised here, by `sync`, or by `close`.
        """
        assert self._descriptor is not None, self._path
        views = [memoryview(part).cast("B") for part in parts if len(part)]
        with self._whole_or_given_up("write"):
            if isinstance(self._file, CachedFile) and not self._blocks.refused:
                views = self._begin_direct(self._file, self._descriptor, views)
            self._file.append(views)

    def sync(self) -> None:
        """Make all that was appended durable."""
        assert self._descriptor is not None, self._path
        with self._whole_or_given_up("write"):
            self._file.flush()
        with self._whole_or_given_up("sync"):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Let go of the file; if it wasn't synced, its last few MiB may not have been written."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        with told(self._path, "close"):
            try:
                self._file.drop()
            finally:
                os.close(descriptor)
        if self._file.failure is not None and self._given_up is None:
            with self._whole_or_given_up("write"):
                raise self._file.failure

    @contextlib.contextmanager
    def _whole_or_given_up(self, verb: str) -> Iterator[None]:
        """Once a call was cut short, by whatever, all that follow say so: the file may lack bytes.

        And a second sync wouldn't tell of what the first one failed to write.
        """
        if self._given_up is not None:
            raise self._given_up
        try:
            with told(self._path, verb):
                yield
        except StorageError as error:
            self._given_up = error
            raise
        except BaseException as error:
            self._given_up = StorageError(
                f"can't {verb} {self._path}: it was cut short by {error!r}"
            )
            raise

    def _begin_direct(
        self, file: CachedFile, descriptor: int, views: list[memoryview]
    ) -> list[memoryview]:
        """If the file gets long, write up to where direct writes begin, and the rest so.

        Returns what is left to be appended.
        """
        begin = self._blocks.begin_nbytes
        if file.offset + sum(view.nbytes for view in views) <= begin:
            return views
        first, views = _cut(views, begin - file.offset)
        file.append(first)
        file.start_writeback()
        try:
            self._file = DirectFile(descriptor, begin, self._blocks)
        except OSError as error:
            log.debug("%s: written through the page cache: %s", self._path, error)
            self._blocks.refused = True
        return views


def _cut(views: Sequence[memoryview], nbytes: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first `nbytes` bytes, and those that follow."""
    first, rest = [], []
    for view in views:
        count = min(view.nbytes, nbytes)
        nbytes -= count
        first += [view[:count]] if count else []
        rest += [view[count:]] if count < view.nbytes else []
    return first, rest


def _owner(descriptor: int) -> str:
    """Who has a lock, as far as the file tells."""
    with contextlib.suppress(OSError):
        return os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "unknown"
    return "unknown"


def _close(descriptor: int) -> None:
    """Close a file to which nothing was written: no error of that means anything."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
