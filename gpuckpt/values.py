"""Plain values of a state as JSON, exactly.

JSON's own null, booleans and strings stand for themselves, and so do integers
up to 2**53 and finite floats (Python writes the shortest digits that read back
as the same number).  All else is an object with one key that names its type;
docs/FORMAT.md lists them.  A string with surrogates is among these, since JSON
would join two that follow each other into one character.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuckpt.dtypes import name_of, to_numpy
from gpuckpt.errors import CheckpointError, FormatError

Json = Any

_EXACT_INT = 2**53
_DOUBLE = struct.Struct(">d")


class NotPlainError(Exception):
    """The value is none of those that can be written; the message says what it is."""


def parse_json(text: bytes) -> Json:
    """Read JSON of a stranger: no key twice in one object, no NaN or infinity.

    Numbers of more than 4,300 digits are refused by Python itself.

    Raises:
        ValueError: it isn't JSON, or has one of these.
        RecursionError: it is nested too deep.
    """
    return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_key_twice)


def is_plain(kind: type) -> bool:
    """Whether values of exactly this type are plain ones, most of which can be written."""
    return (kind in _ENCODERS and kind is not tuple) or issubclass(kind, np.generic)


def encode_value(value: object) -> Json:
    """Write one plain value as JSON.

    Raises:
        NotPlainError: it isn't a plain value; subclasses (an IntEnum, say)
            aren't, since they could not come back as what they were.
    """
    if isinstance(value, np.generic):
        return _encode_scalar(value)
    encoder = _ENCODERS.get(type(value))
    if encoder is None:
        raise NotPlainError(f"a {type(value).__module__}.{type(value).__qualname__}")
    return encoder(value)


def decode_value(data: Json) -> Any:
    """Read a plain value back: the inverse of `encode_value`."""
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if not isinstance(data, dict) or len(data) != 1:
        raise FormatError(f"not a plain value: {str(data)[:80]}")
    ((kind, payload),) = data.items()
    try:
        return _DECODERS[kind](payload)
    except KeyError:
        raise FormatError(f"no plain value is of kind {kind!r} in this gpuckpt") from None
    except RecursionError:
        raise FormatError(f"a {kind} is nested too deep") from None
    except (ValueError, TypeError, AttributeError, struct.error, binascii.Error) as error:
        if isinstance(error, CheckpointError):
            raise
        raise FormatError(f"a {kind} can't be {str(payload)[:80]!r}") from error


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} isn't JSON")


def _no_key_twice(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("an object has a key twice")
    return made


def _encode_str(value: str) -> Json:
    if value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value):
        return value
    return {"str": _text(value.encode("utf-8", "surrogatepass"))}


def _decode_str(payload: Json) -> str:
    return base64.b64decode(payload, validate=True).decode("utf-8", "surrogatepass")


def _encode_int(value: int) -> Json:
    return value if abs(value) <= _EXACT_INT else {"int": hex(value)}


def _encode_float(value: float) -> Json:
    return value if math.isfinite(value) else {"float": _DOUBLE.pack(value).hex()}


def _encode_complex(value: complex) -> Json:
    return {"complex": [_encode_float(value.real), _encode_float(value.imag)]}


def _encode_scalar(value: np.generic) -> Json:
    name = name_of(value.dtype) if value.dtype.itemsize else value.dtype.str[1:]
    if name is None:
        raise NotPlainError(f"a scalar of type {value.dtype}")
    element = np.array(value)  # a copy
    if value.dtype.type in (np.longdouble, np.clongdouble) and element.nbytes >= 16:
        # x86's ten bytes and six that hold anything: the same value is to give the same text.
        element.reshape(1).view(np.uint8).reshape(-1, 16)[:, 10:] = 0
    return {"scalar": [name, _text(element.tobytes())]}


def _decode_scalar(payload: Json) -> np.generic:
    name, data = payload
    dtype, raw = _scalar_dtype(name), base64.b64decode(data, validate=True)
    if len(raw) != dtype.itemsize:
        raise ValueError(f"{len(raw)} bytes for one {name}")
    if dtype.kind == "S":  # an element of an array would lose the zeros at its end
        return np.bytes_(raw)
    if dtype.kind == "U":
        return np.str_(raw.decode("utf-32-le", "surrogatepass"))
    scalar: np.generic = np.frombuffer(raw, dtype)[0]
    return scalar


def _scalar_dtype(name: str) -> np.dtype[np.generic]:
    """As of a tensor's elements; a string may also be empty."""
    return np.dtype(name) if name in ("S0", "U0") else to_numpy(name)


def _decode_float(payload: Json) -> float:
    if isinstance(payload, str):
        number: float = _DOUBLE.unpack(bytes.fromhex(payload))[0]
        return number
    return float(payload)


def _decode_complex(payload: Json) -> complex:
    real, imaginary = (decode_value(part) for part in payload)
    return complex(real, imaginary)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _same(value: Any) -> Json:
    return value


_ENCODERS: dict[type, Callable[[Any], Json]] = {
    type(None): _same,
    bool: _same,
    str: _encode_str,
    int: _encode_int,
    float: _encode_float,
    complex: _encode_complex,
    bytes: lambda value: {"bytes": _text(value)},
    bytearray: lambda value: {"bytearray": _text(bytes(value))},
    tuple: lambda value: {"tuple": [encode_value(item) for item in value]},
}
_DECODERS: dict[str, Callable[[Json], Any]] = {
    "str": _decode_str,
    "int": lambda payload: int(payload, 16),
    "float": _decode_float,
    "complex": _decode_complex,
    "bytes": lambda payload: base64.b64decode(payload, validate=True),
    "bytearray": lambda payload: bytearray(base64.b64decode(payload, validate=True)),
    "scalar": _decode_scalar,
    "tuple": lambda payload: tuple(decode_value(item) for item in payload),
}
