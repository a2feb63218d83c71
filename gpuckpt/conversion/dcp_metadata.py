"""The `.metadata` of a torch.distributed.checkpoint directory, read without torch.

It is a pickle of dataclasses (`torch/distributed/checkpoint/metadata.py` and
`filesystem.py`, 2.0 to 2.13), which torch's own reader unpickles, and so would
run what a stranger put there.  Here it is read as data: see `opcodes`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuckpt.boxes import Box
from gpuckpt.conversion.archives import DTYPES, numbers_of
from gpuckpt.conversion.opcodes import Call, Items, Name, read_pickle
from gpuckpt.conversion.shapes import is_shape
from gpuckpt.errors import CorruptError, UnsupportedError
from gpuckpt.structure import Path

_CHUNKS_MAX = 1 << 14


@dataclass(frozen=True, slots=True)
class Slice:
    """Where something lies: `nbytes` at `offset` of a file, an archive of `torch.save`."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Chunked:
    """A tensor, and which boxes of it are where."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[tuple[Box, Slice], ...]


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds, by fully qualified name; and the path of each in the state."""

    tensors: Mapping[str, Chunked]
    objects: Mapping[str, Slice]
    order: Sequence[str]
    paths: Mapping[str, Path]


def read_metadata(data: bytes, where: str) -> Contents:
    """Read the metadata.

    Raises:
        CorruptError: it isn't what DCP writes, or doesn't add up.
        UnsupportedError: a tensor is of a type, or stored in a way, that isn't read.
    """
    try:
        found = _fields(read_pickle(data, where), "Metadata")
        places = _places(found.get("storage_data"))
        tensors: dict[str, Chunked] = {}
        objects: dict[str, Slice] = {}
        for name, entry in _pairs(found["state_dict_metadata"], str):
            if _is(entry, "BytesStorageMetadata"):
                objects[name] = places[name, None]
            else:
                tensors[name] = _tensor(name, _fields(entry, "TensorStorageMetadata"), places)
        order = [name for name, _ in _pairs(found["state_dict_metadata"], str)]
        return Contents(tensors, objects, order, _paths(found.get("planner_data")))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, CorruptError | UnsupportedError):
            raise
        raise CorruptError(
            where,
            f"not what torch.distributed.checkpoint writes ({type(error).__name__}: {error})",
            "take the directory anew from where it was written",
        ) from error


def _is(value: Any, kind: str) -> bool:
    return (
        isinstance(value, Call)
        and isinstance(value.what, Name)
        and value.what.name == kind
        and value.what.module.startswith("torch.distributed.")
    )


def _fields(value: Any, kind: str) -> dict[str, Any]:
    """A dataclass's fields."""
    if not _is(value, kind) or not isinstance(value.state, Items):
        raise TypeError(f"no {kind}")
    return dict(_pairs(value.state, str))


def _pairs(value: Any, kind: type) -> list[tuple[Any, Any]]:
    if not isinstance(value, Items) or not all(isinstance(key, kind) for key, _ in value.pairs):
        raise TypeError(f"no dict whose keys are {kind.__name__}")
    return value.pairs


def _places(value: Any) -> dict[tuple[str, tuple[int, ...] | None], Slice]:
    """Where each chunk is, by name and offset."""
    found = {}
    for key, place in _pairs(value, Call):
        index, info = _fields(key, "MetadataIndex"), _fields(place, "_StorageInfo")
        name, offset = index["fqn"], index.get("offset")
        if info.get("transform_descriptors"):
            raise UnsupportedError(
                str(name), "it went through an extension of DCP's (compressed, say); load it by DCP"
            )
        file, first, nbytes = info["relative_path"], info["offset"], info["length"]
        if type(file) is not str or "/" in file or "\0" in file or file in ("", ".", ".."):
            raise ValueError(f"{file!r} is no file beside it")
        if type(first) is not int or type(nbytes) is not int or min(first, nbytes) < 0:
            raise ValueError(f"{nbytes!r} bytes at {first!r} of {file}")
        at = None if offset is None else numbers_of(offset)
        found[_text(name), at] = Slice(file, first, nbytes)
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a name that is no text")
    return value


def _tensor(
    name: str,
    fields: Mapping[str, Any],
    places: Mapping[tuple[str, tuple[int, ...] | None], Slice],
) -> Chunked:
    shape = numbers_of(fields["size"])
    dtype = _dtype(name, fields["properties"])
    if not is_shape(shape):
        raise ValueError(f"{name} has the shape {shape[:8]}")
    boxes = [_box(_fields(one, "ChunkStorageMetadata"), shape) for one in _list(fields["chunks"])]
    chunks = dict.fromkeys(boxes)
    if len(chunks) > _CHUNKS_MAX:
        raise ValueError(f"{name} has {len(chunks)} chunks")
    full = [box for box in chunks if box.count]
    if sum(box.count for box in full) != math.prod(shape) or _overlap(full):
        raise ValueError(f"the chunks of {name} aren't the whole of it, each element once")
    return Chunked(dtype, shape, tuple((box, places[name, box.offset]) for box in full))


def _dtype(name: str, properties: Any) -> str:
    if not _is(properties, "TensorProperties"):
        raise TypeError("no TensorProperties")
    state = properties.state
    dtype = state[0] if isinstance(state, tuple) and state else dict(_pairs(state, str))["dtype"]
    if not isinstance(dtype, Name) or dtype.module != "torch":
        raise TypeError(f"{name} is of no type of torch's")
    if dtype.name not in DTYPES:
        raise UnsupportedError(name, f"it is of torch.{dtype.name}, which isn't read")
    return dtype.name


def _box(fields: Mapping[str, Any], shape: tuple[int, ...]) -> Box:
    box = Box(numbers_of(fields["offsets"]), numbers_of(fields["sizes"]))
    if not box.fits(shape):
        raise ValueError(f"{box} isn't in a tensor of {shape}")
    return box


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("no list of chunks")
    return value


def _overlap(boxes: Sequence[Box]) -> bool:
    """Whether two boxes have an element in common; in time of their number squared."""
    if len(boxes) < 2 or not boxes[0].shape:
        return len(boxes) > 1
    low = np.array([box.offset for box in boxes], np.int64)
    high = low + np.array([box.shape for box in boxes], np.int64)
    for at in range(1, len(boxes)):
        if bool(((low[:at] < high[at]) & (low[at] < high[:at])).all(axis=1).any()):
            return True
    return False


def _paths(value: Any) -> dict[str, Path]:
    """Where in the state each name was, if the planner has noted it."""
    found: dict[str, Path] = {}
    for name, path in value.pairs if isinstance(value, Items) else ():
        if isinstance(path, tuple) and all(type(key) in (str, int) for key in path):
            found[str(name)] = path
    return found
