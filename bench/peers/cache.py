"""States on disk, made once and read by every peer: two consecutive checkpoints of each workload.

A directory holds the raw bytes of both (`before.bin`, `after.bin`) and
`index.json`: what lies where, the digest of each tensor, and how it was made.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import xxhash

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
Keep = Callable[[str, Mapping[str, Array]], None]

BEFORE, AFTER = "before", "after"
_ALIGN = 64


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: where its bytes lie in both files, and their digests."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    digests: dict[str, str]

    def empty(self) -> Array:
        """Memory for it, which the caller owns."""
        return np.empty(self.shape, dtype_of(self.dtype))


@dataclass(frozen=True, slots=True)
class Workload:
    """Two consecutive checkpoints of one run; `facts` say how they were made."""

    directory: Path
    entries: tuple[Entry, ...]
    facts: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of one checkpoint's tensors."""
        return sum(entry.empty().nbytes for entry in self.entries)

    def load(self, which: str) -> Arrays:
        """Read one of the two into new arrays."""
        arrays = {entry.name: entry.empty() for entry in self.entries}
        self.fill(arrays, which)
        return arrays

    def fill(self, arrays: Mapping[str, Array], which: str) -> None:
        """Read one of the two into arrays that are there."""
        with (self.directory / f"{which}.bin").open("rb", buffering=0) as file:
            for entry in self.entries:
                file.seek(entry.offset)
                view = octets(arrays[entry.name]).data
                while view.nbytes:
                    count = file.readinto(view)
                    assert count, f"{file.name} is too short: delete {self.directory}"
                    view = view[count:]

    def different(self, arrays: Mapping[str, Array], which: str) -> list[str]:
        """Names of the tensors that aren't, bit for bit, those of one of the two."""
        return [
            entry.name
            for entry in self.entries
            if entry.name not in arrays or digest(arrays[entry.name]) != entry.digests[which]
        ]


def octets(array: Array) -> npt.NDArray[np.uint8]:
    """The bytes of a contiguous array, sharing its memory."""
    return np.frombuffer(array.reshape(-1).view(np.uint8).data, np.uint8)


def digest(array: Array) -> str:
    """Of its bytes, dtype and shape."""
    about = f"{array.dtype.name} {array.shape} ".encode()
    code = xxhash.xxh3_128(about)
    code.update(octets(np.ascontiguousarray(array)).data)
    return code.hexdigest()


def dtype_of(name: str) -> np.dtype[Any]:
    """numpy's dtype of this name, or bfloat16."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def open_or_make(directory: Path, make: Callable[[Keep], dict[str, Any]]) -> Workload:
    """Open what an earlier run made, or let `make` hand over both checkpoints and its facts."""
    if not (directory / "index.json").exists():
        new = directory.with_name(f"{directory.name}.{os.getpid()}")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        kept: dict[str, list[dict[str, Any]]] = {}

        def keep(which: str, arrays: Mapping[str, Array]) -> None:
            kept[which] = _write(new / f"{which}.bin", arrays)

        facts = make(keep)
        before = {row["name"]: row["digest"] for row in kept[BEFORE]}
        index = [
            {**row, "digests": {BEFORE: before[row["name"]], AFTER: row["digest"]}}
            for row in kept[AFTER]
        ]
        text = json.dumps({"facts": facts, "tensors": index}, indent=1)
        (new / "index.json").write_text(text, encoding="utf-8")
        shutil.rmtree(directory, ignore_errors=True)
        new.rename(directory)
    return open_workload(directory)


def open_workload(directory: Path) -> Workload:
    """What `open_or_make` left there."""
    index = json.loads((directory / "index.json").read_text("utf-8"))
    entries = tuple(
        Entry(row["name"], row["dtype"], tuple(row["shape"]), row["offset"], row["digests"])
        for row in index["tensors"]
    )
    return Workload(directory, entries, index["facts"])


def _write(path: Path, arrays: Mapping[str, Array]) -> list[dict[str, Any]]:
    rows = []
    with path.open("wb") as file:
        for name, array in arrays.items():
            file.write(bytes(-file.tell() % _ALIGN))
            rows.append(
                {
                    "name": name,
                    "dtype": array.dtype.name,
                    "shape": array.shape,
                    "offset": file.tell(),
                    "digest": digest(array),
                }
            )
            file.write(octets(np.ascontiguousarray(array)).data)
    return rows
