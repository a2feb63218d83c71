"""Ranks of torch.distributed, which meet in the key-value store of its process group.

No collective of the process group is used, so nothing can come between those
of the training; and the connection to the store's server is one of its own, so
that a wait here blocks no wait there.  It is the same for gloo and NCCL.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from gpuckpt.errors import InvalidError
from gpuckpt.groups.board import Patience
from gpuckpt.groups.meeting import Meeting

# A wait of the server's own can't be broken by Ctrl-C, and each that times out is a warning.
_SHORTEST, _LONGEST = 0.001, 0.5
# A server that is stopped, and not dead, is given up after this.
_REQUEST_SECONDS = 30.0
# What no rank puts up.
_ABSENT = "absent"


class C10dBoard:
    """Values in a `torch.distributed.Store`."""

    for_threads = True

    def __init__(self, store: Any) -> None:
        """`store` is used by nobody else at the same time."""
        self._store = store
        self._patience = Patience(_SHORTEST, _LONGEST)

    def put(self, key: str, value: bytes) -> None:
        """Put a value there, in the place of any that is."""
        with _reached():
            self._store.set(key, value)

    def wait(self, key: str, timeout: float) -> bytes | None:
        """The value, once it is there; None if it isn't in time."""
        with _reached():
            return self._patience.wait(key, timeout, lambda: self._look(key))

    def remove(self, key: str) -> None:
        """Take a value away, if it is there."""
        with _reached():
            self._store.delete_key(key)

    def sweep(self, run: str, session: str) -> None:
        """Nothing: the store lives as long as the job."""

    def _look(self, key: str) -> bytes | None:
        # In one request: `get` waits for a value that is taken away after a `check`.
        found = bytes(self._store.compare_set(key, _ABSENT, _ABSENT))
        return None if found == _ABSENT.encode() else found


def torch_ranks(group: Any = None, name: str = "gpuckpt") -> Meeting:
    """The ranks of a process group: that of all, unless given.

    Connects to the store's server; if that has ended, gives it up after the
    store's own time-out.

    Raises:
        InvalidError: `torch.distributed` isn't initialised, or this process
            isn't in the process group.
    """
    import torch.distributed

    dist: Any = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        raise InvalidError(
            "torch.distributed isn't initialised; call torch.distributed.init_process_group "
            "first, or pass group='store'"
        )
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise InvalidError("this process isn't in the process group that was given as group=")
    with _reached():
        store = (dist.group.WORLD if group is None else group).get_group_store().clone()
        store.set_timeout(timedelta(seconds=_REQUEST_SECONDS))
    return Meeting(C10dBoard(dist.PrefixStore("gpuckpt", store)), rank, size, name)


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    """What the store raises when its server has gone is a kind of RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(str(error).partition("\n")[0]) from error
