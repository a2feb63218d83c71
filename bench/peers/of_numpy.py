"""Peers that need numpy alone: `savez`, and a clone, a thread and one plain file."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bench.peers.cache import Array, Arrays, octets
from bench.peers.files import sync
from bench.peers.peer import Peer


class Savez(Peer):
    """`numpy.savez`: one file, not compressed.  bfloat16 goes as its bits."""

    def begin(self, step: int) -> None:
        """Write all of it."""
        np.savez(self.place(step), allow_pickle=False, **_bits(self.arrays))

    def restore(self, step: int) -> Arrays:
        """Into new arrays."""
        with np.load(self.place(step).with_suffix(".npz"), allow_pickle=False) as file:
            return {name: file[name].view(array.dtype) for name, array in self.arrays.items()}


class CloneThread(Peer):
    """Copy into kept memory, then write one plain file in a thread, and fsync it."""

    def __init__(self, arrays: Arrays, directory: Path) -> None:
        super().__init__(arrays, directory)
        self._kept = {name: np.ones_like(array) for name, array in arrays.items()}
        self._thread = threading.Thread()
        self._failure: BaseException | None = None

    def begin(self, step: int) -> None:
        """Copy, and start the thread."""
        for name, kept in self._kept.items():
            np.copyto(kept, self.arrays[name])
        self._thread = threading.Thread(target=self._write, args=(self.place(step),))
        self._thread.start()

    def _write(self, path: Path) -> None:
        try:
            write_plain(path, self._kept)
        except BaseException as error:
            self._failure = error

    def finish(self) -> None:
        """Join the thread."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def restore(self, step: int) -> Arrays:
        """In place."""
        with self.place(step).open("rb", buffering=0) as file:
            for array in self.arrays.values():
                view = octets(array).data
                while view.nbytes:
                    count = file.readinto(view)
                    assert count, f"{file.name} is too short"
                    view = view[count:]
        return self.arrays


def write_plain(path: Path, arrays: Mapping[str, Array]) -> None:
    """All bytes, one array after the other, durable on return."""
    with path.open("wb", buffering=0) as file:
        for array in arrays.values():
            view = octets(array).data
            while view.nbytes:
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    sync(path.parent)


def _bits(arrays: Mapping[str, Array]) -> Arrays:
    """bfloat16 as uint16, whose memory it shares; all else as it is."""
    return {
        name: array.view(np.uint16) if array.dtype.kind == "V" else array
        for name, array in arrays.items()
    }
