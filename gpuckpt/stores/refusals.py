"""The operating system's errors as gpuckpt's own: with the file, the reason, and what to do."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from gpuckpt.errors import CheckpointError, NotFoundError, StorageError

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free space, keep fewer checkpoints, or use another root",
    errno.EDQUOT: "the quota is used up: free space, keep fewer checkpoints, or raise it",
    errno.EFBIG: "files may not get so long here: raise `ulimit -f`, or use another file system",
    errno.EROFS: "the file system is mounted read-only: see the system's log for why",
    errno.EACCES: "check the permissions of the directory",
    errno.EPERM: "check the permissions and attributes of the directory",
    errno.EIO: "the disk reports an error: check it before you trust it again",
    errno.ENOENT: "the directory is gone: see whether it was removed or unmounted",
    errno.ENOTDIR: "a root is a directory, and this is below a file",
    errno.EEXIST: "there is something else of that name: move it away, or use another root",
    errno.EMFILE: "too many open files: raise `ulimit -n`",
    errno.ENFILE: "the system has too many open files: close some, or raise fs.file-max",
    errno.ENOLCK: "the file system keeps no locks here: mount it with them, or use another root",
    errno.ESTALE: "the network file system has lost the file: mount it anew",
}
_OTHERWISE = "see the system's log, and `gpuckpt selftest` for what the file system keeps"


@contextlib.contextmanager
def told(path: Path, verb: str) -> Iterator[None]:
    """Translate the operating system's errors, here and nowhere else."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise translated(error, path, verb) from error


def translated(error: OSError, path: Path, verb: str, where: str = "") -> CheckpointError:
    """An error of the system's while it was to `verb` a file; `where` in it, if that is known."""
    if isinstance(error, FileNotFoundError) and verb in ("read", "rename"):
        return NotFoundError(f"{path}: there is no such file")
    code = error.errno or 0
    reason = error.strerror or str(error)
    remedy = _REMEDIES.get(code, _OTHERWISE)
    refusal = StorageError(f"can't {verb} {path}{where}: {reason}; {remedy}")
    refusal.errno = code
    return refusal
