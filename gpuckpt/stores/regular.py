"""Files that a stranger may have put links, pipes or devices in the place of."""

from __future__ import annotations

import errno
import os
import stat

from gpuckpt.errors import StorageError


def open_file(path: str | os.PathLike[str], flags: int) -> int:
    """A descriptor of a regular file, for the caller to close; may be an `opener` for `open`.

    Follows no link in the place of the file, and waits for nobody at a pipe's other end.

    Raises:
        StorageError: it is a link, a pipe, a device or a directory.
        OSError: the operating system refuses.
    """
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # a link, a socket
            raise _no_file(path) from error
        raise
    try:
        check_regular(path, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_regular(path: str | os.PathLike[str], mode: int) -> None:
    """See that a file's mode is that of a regular one.

    Raises:
        StorageError: it isn't.
    """
    if not stat.S_ISREG(mode):
        raise _no_file(path)


def _no_file(path: str | os.PathLike[str]) -> StorageError:
    return StorageError(
        f"{os.fspath(path)} is a link, a pipe, a device or a directory, and not a file; "
        "put the file itself there, or remove it"
    )
