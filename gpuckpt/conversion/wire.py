"""Protocol Buffers' encoding, as far as old checkpoints use it.

Specification: "Encoding", protobuf.dev/programming-guides/encoding.  A message
is fields; a field is a key, a varint of its number and its wire type, and a
payload.  Groups, which nothing here uses, are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gpuckpt.conversion.window import Window

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_VARINT_NBYTES_MAX = 10
_FIXED = {FIXED64: 8, FIXED32: 4}


@dataclass(frozen=True, slots=True)
class Field:
    """One field: its payload is `nbytes` at `offset` in the file; a varint's is `value`."""

    number: int
    wire: int
    offset: int
    nbytes: int
    value: int = 0

    @property
    def end(self) -> int:
        """Where the next field begins."""
        return self.offset + self.nbytes


def fields(window: Window, begin: int, end: int) -> Iterator[Field]:
    """The fields of the message at [begin, end); payloads of bytes are skipped, not read.

    Raises:
        CorruptError: it is no message.
    """
    at = begin
    while at < end:
        key, after = read_varint(window, at, end)
        number, wire = key >> 3, key & 7
        if not 0 < number < 1 << 29:
            raise window.corrupt(f"byte {at} begins no field of a protobuf message")
        found = _field(window, number, wire, after, end)
        if found.end > end:
            raise window.corrupt(
                f"field {number} at byte {at} ends at {found.end}, its message at {end}"
            )
        yield found
        at = found.end


def _field(window: Window, number: int, wire: int, at: int, end: int) -> Field:
    if wire == VARINT:
        value, after = read_varint(window, at, end)
        return Field(number, wire, at, after - at, value)
    if wire == BYTES:
        nbytes, after = read_varint(window, at, end)
        return Field(number, wire, after, nbytes)
    if wire in _FIXED:
        return Field(number, wire, at, _FIXED[wire])
    raise window.corrupt(f"field {number} at byte {at} is of wire type {wire}, which isn't used")


def read_varint(window: Window, at: int, end: int) -> tuple[int, int]:
    """The unsigned 64-bit number at `at`, and where it ends.

    Raises:
        CorruptError: there is none before `end`.
    """
    value = 0
    data = window.take(at, min(_VARINT_NBYTES_MAX, end - at))
    for index, byte in enumerate(data):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value & (1 << 64) - 1, at + index + 1
    raise window.corrupt(f"byte {at} begins no number of a protobuf message")


def read_varints(window: Window, field: Field) -> Iterator[int]:
    """The numbers of a repeated field, which may be packed or come one by one."""
    if field.wire == VARINT:
        yield field.value
    elif field.wire == BYTES:
        at = field.offset
        while at < field.end:
            value, at = read_varint(window, at, field.end)
            yield value


def signed(value: int, bits: int = 64) -> int:
    """An unsigned number as the int32 or int64 that it stands for."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> bits - 1 else value


def varint(value: int) -> bytes:
    """A number's bytes; negative ones take ten, as those of int32 and int64 do."""
    value &= (1 << 64) - 1
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def number_field(number: int, value: int) -> bytes:
    """A field that is a varint."""
    return varint(number << 3 | VARINT) + varint(value)


def bytes_header(number: int, nbytes: int) -> bytes:
    """A field of bytes, without the bytes, which follow."""
    return varint(number << 3 | BYTES) + varint(nbytes)


def number_fields(number: int, values: Iterable[int]) -> bytes:
    """A repeated field of varints, not packed, as proto2 has them unless told otherwise."""
    return b"".join(number_field(number, value) for value in values)
