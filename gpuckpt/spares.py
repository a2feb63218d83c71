"""What a checkpointer of several ranks does with copies on other machines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from gpuckpt import layout
from gpuckpt.errors import InvalidError
from gpuckpt.groups import Group
from gpuckpt.replicas import Replicas
from gpuckpt.replicas.ring import rank_of
from gpuckpt.stores import Store
from gpuckpt.stores.local import LocalStore

FOLDER = "%s.spare"
# Of the interface by which other machines reach this one, if its name doesn't tell.
ADDRESS = "GPUCKPT_ADDRESS"


def spare_beside(store: Store, rank: int) -> Store:
    """Where a rank keeps another's files: on the disk of its own root.

    Raises:
        InvalidError: the root isn't on a disk of this machine.
    """
    if not isinstance(store, LocalStore):
        raise InvalidError(
            f"replicas=1 is for roots on the machines' own disks; {store.root} isn't one: give "
            "replicas=0"
        )
    root = Path(store.root).absolute()
    return LocalStore(root.with_name(FOLDER % root.name) / f"r{rank}")


class Spares:
    """Copies of this rank's files elsewhere, and of another's here."""

    def __init__(self, group: Group, store: Store) -> None:
        """Nothing is kept before `kept`.  `store` is the rank's root."""
        self._rank, self._store = group.rank, store
        spare = spare_beside(store, group.rank)
        address = os.environ.get(ADDRESS)
        self._replicas = Replicas(group, store, spare, address=address)
        self._recovered = False

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Serve and follow others until the end of the block."""
        with self._replicas:
            yield

    def recover(self) -> None:
        """Before the first restore: bring back what this rank's root lacks; all ranks call it."""
        if not self._recovered:
            self._replicas.recover()
            self._recovered = True

    def after_commit(self) -> None:
        """A step is committed, and what needn't be kept is deleted: copy what is there now."""
        names = [
            name
            for name in self._store.names()
            if layout.manifest_step(name) is not None
            or (layout.data_step(name) is not None and rank_of(name) == self._rank)
        ]
        self._replicas.after_commit(names)

    def is_kept(self, seconds: float) -> bool:
        """Whether the copy of all that was committed is elsewhere; waits for that."""
        return self._replicas.is_kept(seconds)
