"""Variables as Paddle Fluid's `save` operator writes them, one a file.

All numbers are little-endian.  From `paddle/fluid/framework/` at Fluid 0.11 to 1.x:

LoDTensor (`SerializeToStream`, `lod_tensor.cc`):
    uint32 version = 0 · uint64 levels · for each level: uint64 nbytes, size_t offsets[] · Tensor
SelectedRows (`SerializeToStream`, `selected_rows.cc`):
    uint32 version = 0 · uint64 count · int64 rows[count] · int64 height · Tensor
Tensor (`TensorToStream`, `tensor_util.cc`):
    uint32 version = 0 · int32 nbytes · TensorDesc, so long · the elements, to the file's end
TensorDesc (`framework.proto`): required Type data_type = 1 · repeated int64 dims = 2

Nothing says which of the two a file is: the one that it is whole as.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from gpuckpt.conversion.shapes import is_shape
from gpuckpt.conversion.window import Run, Window
from gpuckpt.conversion.wire import (
    VARINT,
    fields,
    number_field,
    number_fields,
    read_varints,
    signed,
)
from gpuckpt.dtypes import to_numpy
from gpuckpt.errors import CorruptError

# `VarType.Type`; what is above 21 came after Fluid had given up checkpoints.
TYPES = {
    "bool": 0,
    "int16": 1,
    "int32": 2,
    "int64": 3,
    "float16": 4,
    "float32": 5,
    "float64": 6,
    "uint64": 19,
    "uint8": 20,
    "int8": 21,
    "bfloat16": 22,
    "complex64": 23,
    "complex128": 24,
}
_NAMES = {number: name for name, number in TYPES.items()}
_U32, _I32, _U64, _I64 = (struct.Struct(f"<{code}") for code in "IiQq")
_LEVELS_MAX = 64
_DESC_NBYTES_MAX = 4 << 10


@dataclass(frozen=True, slots=True)
class Stored:
    """Elements in a file, in C order."""

    dtype: str
    shape: tuple[int, ...]
    run: Run


@dataclass(frozen=True, slots=True)
class Variable:
    """A tensor; with `lod`, the offsets of its sequences, a level each, from the outermost."""

    tensor: Stored
    lod: tuple[Stored, ...] = ()


@dataclass(frozen=True, slots=True)
class SelectedRows:
    """Some rows of a tensor of `height` rows: `rows` are their numbers, `value` they themselves."""

    rows: Stored
    height: int
    value: Stored


def read_variable(window: Window, *, rows_first: bool = False) -> Variable | SelectedRows:
    """What a file has.  Elements aren't read.

    `rows_first` where rows are likelier than a tensor.

    Raises:
        CorruptError: it is neither; the reason is why it isn't what is likelier.
    """
    readers = (_read_rows, _read_tensor) if rows_first else (_read_tensor, _read_rows)
    try:
        return readers[0](window)
    except CorruptError as likelier:
        try:
            return readers[1](window)
        except CorruptError:
            raise likelier from None
    finally:
        window.forget()


def _read_tensor(window: Window) -> Variable:
    _read_version(window, 0)
    levels, at = _number(window, _U64, 4), 12
    if levels > _LEVELS_MAX:
        raise window.corrupt(f"it has {levels} levels of detail")
    lod = []
    for _ in range(levels):
        nbytes = _number(window, _U64, at)
        if nbytes % 8:
            raise window.corrupt(f"a level of detail of {nbytes} bytes at byte {at}")
        lod.append(_stored(window, "uint64", (nbytes // 8,), at + 8))
        at += 8 + nbytes
    return Variable(_read_elements(window, at), tuple(lod))


def _read_rows(window: Window) -> SelectedRows:
    _read_version(window, 0)
    count = _number(window, _U64, 4)
    rows = _stored(window, "int64", (count,), 12)
    at = 12 + 8 * count
    height = _number(window, _I64, at)
    value = _read_elements(window, at + 8)
    if not value.shape or value.shape[0] < count:
        raise window.corrupt(f"it has {count} rows, and a value of the shape {value.shape}")
    return SelectedRows(rows, height, value)


def _read_elements(window: Window, at: int) -> Stored:
    """A Tensor, to the file's end."""
    _read_version(window, at)
    nbytes = _number(window, _I32, at + 4)
    if not 0 <= nbytes <= _DESC_NBYTES_MAX:
        raise window.corrupt(f"a description of {nbytes} bytes at byte {at + 4}")
    begin = at + 8 + nbytes
    window.check(at + 8, nbytes)
    dtype, shape = _read_description(window, at + 8, begin)
    found = _stored(window, dtype, shape, begin)
    if begin + found.run.count * found.run.nbytes != window.nbytes:
        raise window.corrupt(
            f"a tensor of {dtype} and the shape {shape} follows byte {begin}, and the file ends "
            f"at {window.nbytes}"
        )
    return found


def _read_description(window: Window, begin: int, end: int) -> tuple[str, tuple[int, ...]]:
    number: int | None = None
    shape: list[int] = []
    for field in fields(window, begin, end):
        if field.number == 1 and field.wire == VARINT:
            number = field.value
        elif field.number == 2:
            shape += [signed(value) for value in read_varints(window, field)]
    if number not in _NAMES:
        raise window.corrupt(f"elements of type {number} of VarType.Type at byte {begin}")
    if not is_shape(shape):
        raise window.corrupt(f"the shape {tuple(shape[:8])}… at byte {begin}")
    return _NAMES[number], tuple(shape)


def _stored(window: Window, dtype: str, shape: tuple[int, ...], at: int) -> Stored:
    item, count = to_numpy(dtype).itemsize, math.prod(shape)
    window.check(at, count * item)
    return Stored(dtype, shape, Run(window, at, count, item, item))


def _read_version(window: Window, at: int) -> None:
    version = _number(window, _U32, at)
    if version != 0:
        raise window.corrupt(f"version {version} at byte {at}; Fluid's only one is 0")


def _number(window: Window, kind: struct.Struct, at: int) -> int:
    (found,) = kind.unpack(window.take(at, kind.size))
    return int(found)


def encode_levels(count: int) -> bytes:
    """A LoDTensor's beginning, up to its levels, of which there are so many."""
    return _U32.pack(0) + _U64.pack(count)


def encode_level(nbytes: int) -> bytes:
    """A level without its offsets, which follow: so many bytes."""
    return _U64.pack(nbytes)


def encode_rows(count: int) -> bytes:
    """A SelectedRows' beginning, up to the rows' numbers, which follow."""
    return _U32.pack(0) + _U64.pack(count)


def encode_height(height: int) -> bytes:
    """What follows the rows' numbers."""
    return _I64.pack(height)


def encode_elements(dtype: str, shape: Sequence[int]) -> bytes:
    """A Tensor up to its elements, which follow."""
    description = number_field(1, TYPES[dtype]) + number_fields(2, shape)
    return _U32.pack(0) + _I32.pack(len(description)) + description
