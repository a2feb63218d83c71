"""Targets that appear whole or not at all: written under another name, durable, then renamed."""

from __future__ import annotations

import contextlib
import io
import logging
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from gpuckpt.conversion.checksums import Checksums, pack_checksums
from gpuckpt.conversion.standing import Standing, standing
from gpuckpt.errors import CheckpointError, InvalidError, NotFoundError
from gpuckpt.stores import Appender, Buffer, Store
from gpuckpt.stores.local import LocalStore, overwrite, sync_tree
from gpuckpt.stores.opening import is_local, is_url, local_path, open_store, split
from gpuckpt.stores.refusals import told

log = logging.getLogger("gpuckpt")


def path_of(place: str) -> Path:
    """The path of a place on this machine; of a link, what it stands for.

    Raises:
        InvalidError: it is a URL of another place.
    """
    if is_url(place) and not is_local(place):
        raise InvalidError(f"{place}: this format is read and written on this machine only")
    path = local_path(place) if is_url(place) else Path(place).expanduser()
    return path.resolve()


def file_of(place: str) -> tuple[Store, str]:
    """The store that a file is in, and its name there.

    Raises:
        NotFoundError: there is no such file.
    """
    if is_url(place) and not is_local(place):
        root, name = split(place)
        return open_store(root), name
    path = path_of(place)
    if not path.is_file():
        raise NotFoundError(f"{path}: there is no such file")
    return LocalStore(path.parent), path.name


def check_free(path: Path, *, force: bool) -> None:
    """See that a target may be written.

    Raises:
        InvalidError: something is there, and isn't to be replaced.
    """
    with told(path, "read"):
        there = not force and (path.exists() or path.is_symlink())
    if there:
        raise InvalidError(f"{path} is there already; pass force=True (--force) to replace it")


@contextlib.contextmanager
def new_file(
    path: Path,
    *,
    force: bool,
    before: Standing | None = None,
    beginning: Callable[[], bytes] | None = None,
    stale: Path | None = None,
) -> Iterator[Appender]:
    """A file to be appended to; at the end of the block it is durable, and `path` is its name.

    If the block raises, nothing is left of it, and what was at `path` still is.
    With `force` that may be `before`, or whatever was there when the block
    began, and nothing else.  `beginning` is asked at the end for as many bytes as are to
    stand in the place of the first ones; `stale` is a file of the same folder that belongs to the
    one before, and goes with it.
    """
    check_free(path, force=force)
    before = standing(path) if before is None else before
    store, temporary = LocalStore(path.parent), _temporary(path)
    try:
        file = store.create(temporary)
        try:
            yield file
            file.sync()
        finally:
            file.close()
        if beginning is not None:
            overwrite(path.parent / temporary, beginning())
        check_free(path, force=force)
        before.check(path, path)
        if stale is not None:
            store.remove(stale.name)
        store.rename(temporary, path.name)
    except BaseException:
        with contextlib.suppress(CheckpointError):
            store.remove(temporary)
        raise
    store.sync_names()


def put_checksums(path: Path, checksums: Checksums | None) -> None:
    """Put checksums beside a file that has got its name; nothing if there are to be none."""
    if checksums is not None:
        with new_file(path, force=True) as file:
            file.append([pack_checksums(checksums()).encode()])


@contextlib.contextmanager
def scratch_file(path: Path) -> Iterator[tuple[Path, Appender]]:
    """A file beside a target, to be appended to, that is gone at the end of the block."""
    store, name = LocalStore(path.parent), _temporary(path)
    file = store.create(name)
    try:
        yield path.parent / name, file
    finally:
        with contextlib.suppress(CheckpointError):
            file.close()
        store.remove(name)


@contextlib.contextmanager
def new_directory(path: Path, *, force: bool, before: Standing | None = None) -> Iterator[Path]:
    """An empty directory to be filled; at the end of the block all in it is durable, at `path`.

    If the block raises, nothing is left of it.  With `force` it may replace
    `before`, or whatever was there when the block began, and nothing else: that is
    moved aside first, looked at again, and deleted once the new one is in its place.
    """
    check_free(path, force=force)
    before = standing(path) if before is None else before
    temporary, aside = path.parent / _temporary(path), path.parent / _temporary(path)
    try:
        with told(temporary, "create"):
            temporary.mkdir(parents=True)
        yield temporary
        sync_tree(temporary)
        check_free(path, force=force)
        before.check(path, path)
        with told(path, "rename"):
            if before.entries:
                path.rename(aside)
                before.check(aside, path)  # what came between is in it, or it is another one
            temporary.rename(path)
    except BaseException:
        _discard(temporary)
        with contextlib.suppress(OSError):
            if aside.exists() and not path.exists():
                aside.rename(path)
        raise
    try:
        LocalStore(path.parent).sync_names()
    finally:
        if before.entries and not before.delete(aside):
            log.warning("%s: what was in the place of %s isn't all deleted", aside, path)


class Writing(io.RawIOBase):
    """A file that is appended to, for libraries that want a file object; the caller closes it."""

    def __init__(self, file: Appender) -> None:
        self._file = file

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Buffer) -> int:  # type: ignore[override]
        """Append all of `data`."""
        view = memoryview(data).cast("B")
        self._file.append([view])
        return view.nbytes

    def tell(self) -> int:
        """Bytes so far."""
        return self._file.offset


class Reading(io.RawIOBase):
    """A file of a store, for libraries that want a file object."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name, self._at = store, name, 0
        self._nbytes = store.size(name)

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go on at another byte."""
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._nbytes}[whence]
        self._at = max(begin + offset, 0)
        return self._at

    def tell(self) -> int:
        """The next byte's offset."""
        return self._at

    def readinto(self, buffer: Buffer) -> int:  # type: ignore[override]
        """Read as much as there is room for, or left."""
        view = memoryview(buffer).cast("B")
        count = max(min(view.nbytes, self._nbytes - self._at), 0)
        if count:
            self._store.read_into(self._name, self._at, view[:count])
            self._at += count
        return count


def _discard(path: Path) -> None:
    """Delete a directory or a file, as far as the storage lets us."""
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _temporary(path: Path) -> str:
    return f".{path.name}.{secrets.token_hex(4)}.partial"
