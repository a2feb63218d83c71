"""Where a checkpoint of DCP's is, and which step it has there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gpuckpt.errors import CheckpointError, InvalidError
from gpuckpt.seal import Key
from gpuckpt.stores import Store
from gpuckpt.stores.opening import beside, is_local, is_url, local_path, open_store

CheckpointId = str | os.PathLike[str]

# step-300, step_300, global_step300, iter_0000300, epoch=1-step=300.ckpt
_NUMBERED = re.compile(r".*(?:step|iter|iteration)[-_=]?([0-9]{1,12})(?:\.[A-Za-z]+)?")


def step_of(place: CheckpointId) -> int:
    """The step's number, if the last part of a path ends with one; else 0."""
    name = os.fspath(place).partition("?")[0].rstrip("/").rpartition("/")[2]
    match = _NUMBERED.fullmatch(name)
    return int(match[1]) if match else 0


def store_of(place: CheckpointId | None, rank: int | None = None) -> Store:
    """The store of a checkpoint; with a `rank`, of that which this rank has alone.

    Raises:
        InvalidError: no place was given, or nothing reaches it.
    """
    if place is None:
        raise InvalidError("a path is needed: StorageWriter(path), or checkpoint_id=path")
    return open_store(place if rank is None else beside(place, f"rank-{rank}"))


def check_goes(key: Key | None) -> None:
    """See that a writer or a reader can go to another process, which no key does.

    Raises:
        InvalidError: it has the key itself.
    """
    if isinstance(key, bytes | bytearray):
        raise InvalidError(
            "a key isn't given to another process; give StorageWriter and StorageReader the path "
            "of a key file"
        )


def is_place(checkpoint_id: CheckpointId) -> bool:
    """Whether something reaches it: a directory that may be made, or a URL."""
    if is_url(checkpoint_id) and not is_local(str(checkpoint_id)):
        try:
            open_store(checkpoint_id)
        except CheckpointError:
            return False
        return True
    here = local_path(str(checkpoint_id)) if is_url(checkpoint_id) else Path(checkpoint_id)
    here = next(one for one in (here.absolute(), *here.absolute().parents) if one.exists())
    return here.is_dir() and os.access(here, os.W_OK)
