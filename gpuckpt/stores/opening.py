"""A root as people write it, a path or a URL, as the store that it means."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gpuckpt.errors import InvalidError
from gpuckpt.stores import Store, over_fsspec, over_obstore
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.objects import ObjectStore
from gpuckpt.stores.retrying import Retries

# A letter alone before the colon would be a drive; a path may hold `//` and colons.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(root: str | os.PathLike[str]) -> bool:
    """Whether a root is given by a URL; else it is the path of a directory."""
    return isinstance(root, str) and _URL.match(root) is not None


def is_local(url: str) -> bool:
    """Whether a URL names a directory of this machine."""
    return url.startswith("file:")


def open_store(root: str | os.PathLike[str]) -> Store:
    """The store of a root: a directory's path, or a URL.  Reaches nothing yet.

    `file://` is the directory, with all that a path has.  S3 (`s3://`), Google
    Cloud Storage (`gs://`), Azure (`az://`) and this process's memory
    (`memory://`) are reached by obstore, all others (`hdfs://`, `sftp://`, …) by
    fsspec.  Credentials and options are the clients' own: docs/STORES.md.

    Raises:
        InvalidError: no such kind of URL, or what reaches it isn't installed.
    """
    if not is_url(root):
        return LocalStore(root)
    url = urlsplit(str(root))
    if is_local(str(root)):
        return LocalStore(local_path(str(root)))
    retries, scheme = Retries(), url.scheme.lower()
    if scheme in over_obstore.SCHEMES:
        return ObjectStore(over_obstore.open_client(str(root), retries), str(root))
    return ObjectStore(over_fsspec.open_client(str(root)), str(root))


def local_path(url: str) -> Path:
    """The path that a `file://` URL names, on this machine.

    Raises:
        InvalidError: it names another machine.
    """
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise InvalidError(f"{url} names the host {parts.netloc!r}: write file:///path, or a path")
    return Path(unquote(parts.path))


def beside(root: str | os.PathLike[str], name: str) -> str:
    """Where a file of a root is, for people."""
    if not is_url(root):
        return str(Path(root) / name)
    head, mark, query = str(root).partition("?")
    return f"{head.rstrip('/')}/{name}{mark}{query}"


def split(place: str) -> tuple[str, str]:
    """A URL's root and the last part of its path: undoes `beside`."""
    head, mark, query = place.partition("?")
    root, _, name = head.rstrip("/").rpartition("/")
    return f"{root}{mark}{query}", name
