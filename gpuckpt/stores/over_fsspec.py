"""HDFS, SFTP and whatever else fsspec reaches.

fsspec makes nothing depend on what is there, but for a file's not being there,
and that not in one step everywhere: see docs/STORES.md.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gpuckpt.errors import InvalidError, StorageError
from gpuckpt.layout import TEMPORARY
from gpuckpt.stores import Buffer, Bytes
from gpuckpt.stores.clients import (
    ClashError,
    ClientError,
    MissingError,
    Over,
    PassingError,
    RefusedError,
    Tag,
    UnableError,
)

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# Whose files appear when they are whole; elsewhere a file has another name until it is.
_WHOLE = {
    *("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "memory"),
    *("oci", "ocilake", "obs", "tos", "tosfs", "hf", "r2"),
}
# What may tell one content of a file from another, where there is no tag.
_MARKS = ("ETag", "etag", "generation", "mtime", "LastModified", "last_modified", "created", "ino")
_FOR_GOOD = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR}


class FsspecClient:
    """A `Client` through fsspec."""

    def __init__(self, files: AbstractFileSystem, root: str) -> None:
        """`root` is a path as `files` knows it."""
        self._files, self._root = files, root.rstrip("/")
        protocol = files.protocol
        names = {protocol} if isinstance(protocol, str) else set(protocol)
        self.whole = bool(names & _WHOLE)

    def put(self, name: str, data: Buffer, over: Over) -> Tag:
        """Put a whole file; `over` may be `anything` or `nothing`."""
        if not isinstance(over, str):
            raise UnableError("fsspec can't replace a file only if it is a certain one")
        path = self._at(name)
        with _told():
            if self.whole:
                mode = "create" if over == "nothing" else "overwrite"
                self._files.pipe_file(path, bytes(data), mode=mode)
            else:
                if over == "nothing" and self._files.exists(path):
                    raise ClashError(f"{path} exists")
                self._files.makedirs(self._root, exist_ok=True)
                self._files.pipe_file(path + TEMPORARY, bytes(data))
                self._move(path + TEMPORARY, path)
        return self.head(name)[1]

    def put_parts(self, name: str, parts: Iterator[Bytes]) -> None:
        """Write a file, part by part; its client may send several at a time."""
        path = self._at(name)
        first = next(parts)
        with _told():
            if not self.whole:
                self._files.makedirs(self._root, exist_ok=True)
            file = self._files.open(path, "wb", block_size=first.nbytes)
            try:
                file.write(first.data)
                for part in parts:
                    file.write(part.data)
            except BaseException:
                self._undo(file, path)
                raise
            file.close()

    def get(self, name: str) -> tuple[bytes, Tag]:
        """A whole file."""
        with _told():
            return bytes(self._files.cat_file(self._at(name))), self.head(name)[1]

    def get_range(self, name: str, offset: int, nbytes: int) -> Buffer:
        """Some bytes of a file; fewer if it ends before."""
        with _told():
            found = self._files.cat_file(self._at(name), start=offset, end=offset + nbytes)
        return bytes(found)

    def head(self, name: str) -> tuple[int, Tag]:
        """Bytes in a file, and what tells its contents from others."""
        with _told():
            self._files.invalidate_cache(self._root)
            found = self._files.info(self._at(name))
        return int(found["size"]), _tag(found)

    def list(self) -> dict[str, int]:
        """All files directly below the root."""
        with _told(), contextlib.suppress(FileNotFoundError):
            self._files.invalidate_cache(self._root)
            found = self._files.ls(self._root, detail=True)
            files = (one for one in found if one["type"] == "file")
            return {one["name"].rpartition("/")[2]: int(one["size"] or 0) for one in files}
        return {}

    def delete(self, name: str) -> None:
        """Delete a file."""
        with _told(), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _move(self, old: str, new: str) -> None:
        """Give a file another name; where that may not be taken, it is free for a moment."""
        try:
            self._files.mv(old, new)
        except OSError:
            if not self._files.exists(old) or not self._files.exists(new):
                raise
            self._files.rm_file(new)
            self._files.mv(old, new)

    def _undo(self, file: Any, path: str) -> None:
        """Leave nothing of a file, as far as its client lets us."""
        with contextlib.suppress(Exception):
            file.discard()
        with contextlib.suppress(Exception):
            file.closed = True  # else the collector would write it
        with contextlib.suppress(Exception):
            self._files.rm_file(path)


def open_client(url: str) -> FsspecClient:
    """A client for a URL, with the options that fsspec's own configuration has for its kind.

    Raises:
        InvalidError: fsspec, or what it needs for this kind of URL, isn't installed.
        StorageError: it connects at once, and nobody is there.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        advice = "pip install 'gpuckpt[fsspec]'"
        raise InvalidError(f"{url} needs fsspec, which isn't installed: {advice}") from error
    try:
        files, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InvalidError(f"{url}: fsspec can't reach it: {error}") from error
    except OSError as error:  # some kinds connect at once
        raise StorageError(f"{url}: fsspec can't reach it: {error}") from error
    return FsspecClient(files, path)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Translate what the file systems below fsspec raise, here and nowhere else."""
    try:
        yield
    except (ClientError, GeneratorExit):
        raise
    except FileNotFoundError as error:
        raise MissingError(str(error)) from error
    except FileExistsError as error:
        raise ClashError(str(error)) from error
    except OSError as error:
        kind = RefusedError if error.errno in _FOR_GOOD else PassingError
        raise kind(f"{type(error).__name__}: {error}") from error
    except (TypeError, ValueError, NotImplementedError) as error:
        raise RefusedError(f"{type(error).__name__}: {error}") from error
    except Exception as error:  # each file system has errors of its own
        raise PassingError(f"{type(error).__name__}: {error}") from error


def _tag(found: Any) -> Tag:
    marks = [str(found[mark]) for mark in _MARKS if found.get(mark) is not None]
    return {"e_tag": " ".join([str(found["size"]), *marks]), "version": None}
