"""gpuckpt itself: each codec, with the state copied or held."""

from __future__ import annotations

import contextlib
from pathlib import Path

import gpuckpt
from bench.peers.cache import Arrays
from bench.peers.peer import Peer

BUFFERS = 256 << 20


class Gpuckpt(Peer):
    """A `Checkpointer` that saves every step; numpy arrays, restored in place."""

    def __init__(self, arrays: Arrays, directory: Path, *, codec: str, snapshot: str) -> None:
        super().__init__(arrays, directory)
        nbytes = sum(array.nbytes for array in arrays.values())
        kept = nbytes * ((snapshot == "copy") + (codec == "delta"))
        self._checkpointer = gpuckpt.Checkpointer(
            directory,
            every=gpuckpt.Every(steps=1),
            codec=codec,
            snapshot=snapshot,
            memory=kept + BUFFERS,
        )
        self._checkpointer.resume(arrays)
        self._pending: gpuckpt.Pending | None = None

    def begin(self, step: int) -> None:
        """Copy, or list what is to be read."""
        self._pending = self._checkpointer.step(step, self.arrays)

    def update(self) -> contextlib.AbstractContextManager[None]:
        """Wait, in `hold`, until nothing of the state is read any more."""
        return self._checkpointer.update()

    def finish(self) -> None:
        """Wait for the commit."""
        assert self._pending is not None
        self._pending.result()

    def restore(self, step: int) -> Arrays:
        """In place."""
        self._checkpointer.restore(self.arrays, step)
        return self.arrays

    def close(self) -> None:
        """Give the root back."""
        self._checkpointer.close()
