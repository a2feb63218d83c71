"""Apache SINGA's checkpoint files: one `BlobProtos` message each.

From SINGA 0.1 to 0.3, `src/proto/common.proto`:

    message BlobProto  { repeated int32 shape = 1; repeated float data = 2 [packed = true]; }
    message BlobProtos { repeated int32 id = 2; repeated int32 version = 3;
                         repeated string name = 4; repeated BlobProto blob = 5; }

`Worker::Checkpoint` (`src/worker.cc`) adds a version, a name and a blob for
each parameter that a worker owns, and no id.  So the i-th of each belong together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gpuckpt.conversion.shapes import DIMENSIONS_MAX, is_shape
from gpuckpt.conversion.window import Run, Window
from gpuckpt.conversion.wire import (
    BYTES,
    FIXED32,
    Field,
    bytes_header,
    fields,
    number_fields,
    read_varints,
    signed,
)
from gpuckpt.errors import CorruptError

_SHAPE, _DATA = 1, 2
_VERSION, _NAME, _BLOB = 3, 4, 5
FLOAT_NBYTES = 4
DIMENSION_MAX = (1 << 31) - 1
NAME_NBYTES_MAX = 4 << 10
# Of a file: what a parser keeps in memory for each takes more than the file may have for it.
_PARAMS_MAX = 1 << 20
_RUNS_MAX = 1 << 10


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter in a file: float32, little-endian, in C order; its data is `runs`."""

    name: str
    version: int | None
    shape: tuple[int, ...]
    runs: tuple[Run, ...]

    def cut(self, start: int, count: int) -> Iterator[Run]:
        """Where `count` of its elements are, from the `start`-th on."""
        for run in self.runs:
            here = min(max(run.count - start, 0), count)
            if here:
                yield run.cut(start, here)
            start, count = max(start - run.count, 0), count - here


def read_params(window: Window) -> list[Param]:
    """What is in a file, in its order.  Data isn't read.

    Raises:
        CorruptError: it is no `BlobProtos`, or one that doesn't add up.
    """
    names: list[str] = []
    versions: list[int] = []
    blobs: list[tuple[tuple[int, ...], tuple[Run, ...]]] = []
    for field in fields(window, 0, window.nbytes):
        if field.number == _VERSION:
            versions += [signed(value, 32) for value in read_varints(window, field)]
        elif field.number == _NAME and field.wire == BYTES:
            names.append(_name(window, field))
        elif field.number == _BLOB and field.wire == BYTES:
            blobs.append(_blob(window, field, len(blobs)))
        if max(len(names), len(versions), len(blobs)) > _PARAMS_MAX:
            raise window.corrupt(f"it has more than {_PARAMS_MAX} parameters")
    if len(names) != len(blobs) or len(versions) not in (0, len(blobs)):
        raise window.corrupt(
            f"it has {len(names)} names, {len(versions)} versions and {len(blobs)} blobs"
        )
    window.forget()
    every: Sequence[int | None] = versions or [None] * len(names)
    return [
        Param(name, version, *blob) for name, version, blob in zip(names, every, blobs, strict=True)
    ]


def _name(window: Window, field: Field) -> str:
    if field.nbytes > NAME_NBYTES_MAX:
        raise window.corrupt(f"the name at byte {field.offset} is {field.nbytes} bytes long")
    try:
        return window.take(field.offset, field.nbytes).decode()
    except UnicodeDecodeError:
        raise window.corrupt(f"the name at byte {field.offset} isn't UTF-8") from None


def _blob(window: Window, blob: Field, number: int) -> tuple[tuple[int, ...], tuple[Run, ...]]:
    shape: list[int] = []
    runs: list[Run] = []
    for field in fields(window, blob.offset, blob.end):
        if field.number == _SHAPE:
            for value in read_varints(window, field):
                shape.append(signed(value, 32))
                if len(shape) > DIMENSIONS_MAX:
                    raise _odd_shape(window, number, shape)
        elif field.number == _DATA and field.wire in (BYTES, FIXED32):
            _add_run(window, runs, field)
    count = sum(run.count for run in runs)
    if not shape and not count:
        shape = [0]  # SINGA's own for a blob that was never given a shape
    if not is_shape(shape):
        raise _odd_shape(window, number, shape)
    if math.prod(shape) != count:
        raise window.corrupt(f"blob {number} has {count} floats, and its shape is {tuple(shape)}")
    return tuple(shape), tuple(runs)


def _odd_shape(window: Window, number: int, shape: Sequence[int]) -> CorruptError:
    return window.corrupt(f"blob {number} has the shape {tuple(shape[:8])}…")


def _add_run(window: Window, runs: list[Run], field: Field) -> None:
    """Floats come packed; or one by one, which any reader has to take, each after its key."""
    if field.nbytes % FLOAT_NBYTES:
        raise window.corrupt(f"the floats at byte {field.offset} are {field.nbytes} bytes")
    last = runs[-1] if runs else None
    spaced = 1 + FLOAT_NBYTES
    if (
        field.wire == FIXED32
        and last is not None
        and last.stride == spaced
        and last.offset + last.count * spaced == field.offset
    ):
        runs[-1] = Run(window, last.offset, last.count + 1, FLOAT_NBYTES, spaced)
        return
    stride = spaced if field.wire == FIXED32 else FLOAT_NBYTES
    if field.nbytes:
        runs.append(Run(window, field.offset, field.nbytes // FLOAT_NBYTES, FLOAT_NBYTES, stride))
    if len(runs) > _RUNS_MAX:
        raise window.corrupt(f"the floats before byte {field.offset} lie in too many places")


def encode_head(names: Sequence[str], versions: Sequence[int]) -> bytes:
    """A file's beginning, up to its blobs, as protobuf's own writer orders it: by field number."""
    return number_fields(_VERSION, versions) + b"".join(
        bytes_header(_NAME, len(name.encode())) + name.encode() for name in names
    )


def encode_blob_head(shape: Sequence[int]) -> bytes:
    """A blob without its floats, which follow."""
    nbytes = math.prod(shape) * FLOAT_NBYTES
    head = number_fields(_SHAPE, shape)
    if nbytes:  # protobuf writes nothing for a packed field without elements
        head += bytes_header(_DATA, nbytes)
    return bytes_header(_BLOB, len(head) + nbytes) + head
