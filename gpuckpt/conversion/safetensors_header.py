"""The header of a safetensors file, to and from bytes, trusting nothing.

Eight bytes (little-endian) with the header's length; the header, JSON in
UTF-8, filled up with spaces to a multiple of eight; the tensors' bytes,
back to back, little-endian, in C order.  The larger elements come first, so that each
tensor begins at a multiple of its elements' size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpuckpt.dtypes import to_numpy
from gpuckpt.entries import as_count, as_text
from gpuckpt.errors import CorruptError, UnsupportedError
from gpuckpt.manifest import NOT_AS_EXPECTED
from gpuckpt.spec import Spec
from gpuckpt.tensors import AXES_MAX
from gpuckpt.values import Json, parse_json

LENGTH_NBYTES = 8
# Readers refuse longer ones.
HEADER_NBYTES_MAX = 100_000_000
METADATA = "__metadata__"
# In the order in which tensors of these types lie in a file, as the safetensors library has it.
DTYPES = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
# Two elements and more share bytes, which numpy has no type for.
PACKED = ("F4", "F6_E2M3", "F6_E3M2")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {dtype: at for at, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself: each tensor, where its bytes begin in the file, and text."""

    specs: tuple[Spec, ...]
    offsets: tuple[int, ...]
    metadata: Mapping[str, str]


def check_spec(spec: Spec) -> None:
    """See that a file can hold a tensor.

    Raises:
        UnsupportedError: its elements are of a type that the format lacks, or its name is taken.
    """
    if spec.dtype not in _NAMES:
        raise UnsupportedError(
            spec.name,
            f"safetensors has no elements of type {spec.dtype}; convert the array before, or "
            "leave it out by names=",
        )
    if spec.name == METADATA or not _is_text(spec.name):
        raise UnsupportedError(spec.name, "safetensors can't have a tensor of this name")


def file_order(specs: Sequence[Spec]) -> list[int]:
    """The positions of tensors in the order in which they lie in a file."""
    return sorted(range(len(specs)), key=lambda at: (_ORDER[specs[at].dtype], specs[at].name))


def pack_header(specs: Sequence[Spec], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a file of these tensors, in this order.

    Raises:
        UnsupportedError: it is longer than readers take.
    """
    rows: dict[str, Json] = {METADATA: dict(metadata)} if metadata else {}
    at = 0
    for spec in specs:
        end = at + spec.nbytes
        shape, dtype = list(spec.shape), _NAMES[spec.dtype]
        rows[spec.name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH_NBYTES)
    if len(text) > HEADER_NBYTES_MAX:
        raise UnsupportedError(
            "", f"a header of {len(text)} bytes, {HEADER_NBYTES_MAX} at most are read; use shards"
        )
    return len(text).to_bytes(LENGTH_NBYTES, "little") + text


def header_nbytes(beginning: bytes, file_nbytes: int, where: str) -> int:
    """How long the header is that begins after a file's first bytes.

    Raises:
        CorruptError: it can't be so long.
    """
    length = int.from_bytes(beginning, "little")
    if length > min(HEADER_NBYTES_MAX, file_nbytes - LENGTH_NBYTES):
        raise CorruptError(where, f"a header of {length} bytes in a file of {file_nbytes}")
    return length


def unpack_header(text: bytes, file_nbytes: int, where: str) -> Header:
    """Read a header: undoes `pack_header`.

    Raises:
        CorruptError: it isn't one, or its tensors overlap, or bytes are nobody's.
        UnsupportedError: a tensor's elements are smaller than a byte.
    """
    if not text.startswith(b"{"):
        raise CorruptError(where, "not a safetensors file")
    try:
        rows = parse_json(text)
        metadata = {as_text(key): as_text(value) for key, value in rows.pop(METADATA, {}).items()}
        found = [_unpack_row(name, row) for name, row in rows.items()]
    except NOT_AS_EXPECTED as error:
        if isinstance(error, UnsupportedError):
            raise
        raise CorruptError(where, f"not a safetensors file ({error})") from error
    begin = LENGTH_NBYTES + len(text)
    _check_places(found, file_nbytes - begin, where)
    return Header(
        tuple(spec for spec, _ in found), tuple(begin + first for _, first in found), metadata
    )


def _unpack_row(name: str, row: Json) -> tuple[Spec, int]:
    dtype, shape = as_text(row["dtype"]), tuple(as_count(extent) for extent in row["shape"])
    first, end = (as_count(at) for at in row["data_offsets"])
    if dtype in PACKED:
        raise UnsupportedError(
            name, f"elements of type {dtype}, several to a byte, aren't converted"
        )
    if dtype not in DTYPES or row.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: {str(row)[:80]}")
    if len(shape) > AXES_MAX or not _is_text(name):
        raise ValueError(f"{name!r} has {len(shape)} axes, or isn't text")
    nbytes = math.prod(shape) * to_numpy(DTYPES[dtype]).itemsize
    if end - first != nbytes:
        raise ValueError(f"{name}: {end - first} bytes for {nbytes}")
    return Spec(name, DTYPES[dtype], shape), first


def _check_places(found: Sequence[tuple[Spec, int]], nbytes: int, where: str) -> None:
    """Every byte is one tensor's."""
    at = 0
    for spec, first in sorted(found, key=lambda one: (one[1], one[0].nbytes)):
        if first != at:
            raise CorruptError(where, f"{spec.name} begins at byte {first} of the data, not {at}")
        at += spec.nbytes
    if at != nbytes:
        raise CorruptError(where, f"its tensors have {at} bytes, the file {nbytes}")


def _is_text(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)
