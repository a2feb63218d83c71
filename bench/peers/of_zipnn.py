"""ZipNN, which codes tensors without loss; a file of our own around it, as it has none."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.cache import Arrays, octets
from bench.peers.peer import Peer

_KINDS = {"float32": "float32", "bfloat16": "bfloat16"}


class Zipnn(Peer):
    """Each tensor coded with as many threads as there are cores; others as they are."""

    def __init__(self, arrays: Arrays, directory: Path) -> None:
        super().__init__(arrays, directory)
        import zipnn

        threads = len(os.sched_getaffinity(0))
        self._coders: dict[str, Any] = {
            name: zipnn.ZipNN(input_format="byte", bytearray_dtype=kind, threads=threads)
            for name, kind in _KINDS.items()
        }

    def begin(self, step: int) -> None:
        """Code and write, one after the other."""
        index = {}
        with self.place(step).open("wb") as file:
            for name, array in self.arrays.items():
                coder = self._coders.get(array.dtype.name)
                raw = octets(array)
                coded = coder.compress(bytearray(raw.data)) if coder else raw.data
                index[name] = (file.tell(), len(coded))
                file.write(coded)
            text = json.dumps(index).encode()
            file.write(text + struct.pack("<Q", len(text)))

    def restore(self, step: int) -> Arrays:
        """Into new arrays."""
        restored = {}
        with self.place(step).open("rb") as file:
            file.seek(-8, os.SEEK_END)
            (length,) = struct.unpack("<Q", file.read(8))
            file.seek(-8 - length, os.SEEK_END)
            index = json.loads(file.read(length))
            for name, array in self.arrays.items():
                offset, length = index[name]
                file.seek(offset)
                coded = file.read(length)
                coder = self._coders.get(array.dtype.name)
                raw = coder.decompress(coded) if coder else coded
                restored[name] = np.frombuffer(raw, array.dtype).reshape(array.shape)
        return restored
