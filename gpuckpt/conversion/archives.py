"""What `torch.save` writes, read without torch and without running anything.

A zip archive, not compressed, of one folder: `data.pkl`, a pickle (`opcodes`)
in which tensors refer to storages; `data/KEY`, a storage's bytes; `byteorder`.
From `torch/serialization.py` and `torch/_utils.py`, 1.6 to 2.13.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpuckpt.conversion.opcodes import Name, Stored, is_call, read_pickle
from gpuckpt.conversion.shapes import is_shape
from gpuckpt.conversion.window import Window
from gpuckpt.dtypes import to_numpy
from gpuckpt.errors import CheckpointError

# Types that torch and gpuckpt both have, by torch's names, which are the same.
DTYPES = frozenset(
    (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128", "bfloat16"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
)
_OF_STORAGES = {
    "BoolStorage": "bool",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ByteStorage": "uint8",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "BFloat16Storage": "bfloat16",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_PICKLE_NBYTES_MAX = 16 << 20
_READ_NBYTES_MAX = 64 << 20
_LOCAL_HEADER_NBYTES = 30


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of an archive: where its bytes begin in the window's file, and their CRC-32."""

    offset: int
    nbytes: int
    crc: int


@dataclass(frozen=True, slots=True)
class Laid:
    """A tensor as it lies in a storage: `start` and `strides` are in elements."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    strides: tuple[int, ...]
    storage: Entry

    @property
    def is_in_order(self) -> bool:
        """Whether its elements follow each other in C order."""
        wanted = 1
        for extent, stride in zip(self.shape[::-1], self.strides[::-1], strict=True):
            if extent > 1 and stride != wanted:
                return False
            wanted *= extent
        return True


class Archive:
    """One archive, which is part of a file."""

    def __init__(self, window: Window, offset: int, nbytes: int) -> None:
        """Reads its directory and its pickle, and no tensor.

        Raises:
            CorruptError: it is no such archive.
        """
        window.check(offset, nbytes)
        self._window, self._where = window, f"{window.where} at byte {offset}"
        try:
            with zipfile.ZipFile(_View(window, offset, nbytes)) as found:
                self._infos = {info.filename: info for info in found.infolist()}
        except CheckpointError:
            raise
        except Exception as error:  # zipfile's own are of many kinds
            raise window.corrupt(f"no archive of torch.save at byte {offset} ({error})") from error
        self._offset, self._end = offset, offset + nbytes
        pickles = [name for name in self._infos if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise window.corrupt(f"no archive of torch.save at byte {offset}: no data.pkl")
        self._folder = pickles[0].removesuffix("data.pkl")
        self._check_order()
        text = self._entry("data.pkl")
        if text.nbytes > _PICKLE_NBYTES_MAX:
            raise window.corrupt(f"a pickle of {text.nbytes} bytes at byte {text.offset}")
        self.value = read_pickle(window.take(text.offset, text.nbytes), self._where)

    def tensor(self, value: Any) -> Laid:
        """What of the pickle is a tensor, as it lies.

        Raises:
            CorruptError: it is none, or doesn't lie in its storage.
        """
        if is_call(value, "torch._utils._rebuild_parameter"):
            value = _first(value.args)
        if not is_call(value, *_TENSORS):
            raise self._window.corrupt(f"no plain tensor at byte {self._offset}")
        try:
            return self._laid(value.args)
        except (TypeError, ValueError, IndexError, KeyError) as error:
            raise self._window.corrupt(
                f"no tensor that can be read at byte {self._offset} ({error})"
            ) from error

    def _laid(self, args: Sequence[Any]) -> Laid:
        stored, start, shape, strides = args[:4]
        kind, storage, key = stored.key[:3] if isinstance(stored, Stored) else (None, None, None)
        if kind != "storage" or not isinstance(storage, Name) or not isinstance(key, str):
            raise ValueError("its storage isn't one")
        shape, strides = numbers_of(shape), numbers_of(strides)
        dtype = args[6].name if storage.name == "UntypedStorage" else _OF_STORAGES[storage.name]
        if dtype not in DTYPES or not is_shape(shape) or len(strides) != len(shape):
            raise ValueError(f"it is of {dtype!r}, {shape} and {strides}")
        entry = self._entry(f"data/{key}")
        last = start + sum((n - 1) * by for n, by in zip(shape, strides, strict=True))
        found = Laid(dtype, shape, start, strides, entry)
        if type(start) is not int or min((start, *strides)) < 0:
            raise ValueError(f"it begins at {start}, with {strides}")
        if math.prod(shape) and (last + 1) * to_numpy(dtype).itemsize > entry.nbytes:
            raise ValueError("it ends after its storage")
        return found

    def _check_order(self) -> None:
        if self._folder + "byteorder" in self._infos:
            entry = self._entry("byteorder")
            order = self._window.take(entry.offset, min(entry.nbytes, 16))
            if order != b"little":
                raise self._window.corrupt(f"the byte order is {order!r}, and only little is read")

    def _entry(self, name: str) -> Entry:
        info = self._infos.get(self._folder + name)
        if info is None:
            raise self._window.corrupt(f"the archive at byte {self._offset} has no {name}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise self._window.corrupt(f"{name} of the archive at {self._offset} is compressed")
        begin = self._offset + info.header_offset
        head = self._window.take(begin, _LOCAL_HEADER_NBYTES)
        lengths = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        at = begin + _LOCAL_HEADER_NBYTES + lengths
        if info.header_offset < 0 or at + info.file_size > self._end:
            raise self._window.corrupt(f"{name} ends after the archive at byte {self._offset}")
        return Entry(at, info.file_size, info.CRC)


def numbers_of(value: Any) -> tuple[int, ...]:
    """A shape or strides: a tuple, or `torch.Size` of one.

    Raises:
        TypeError: it is something else.
    """
    if is_call(value, "torch.Size"):
        value = _first(value.args)
    if not isinstance(value, tuple | list) or not all(type(one) is int for one in value):
        raise TypeError("no numbers where a shape should be")
    return tuple(value)


def _first(args: Any) -> Any:
    return args[0] if isinstance(args, tuple) and args else None


class _View(io.RawIOBase):
    """Part of a file, for `zipfile`."""

    def __init__(self, window: Window, offset: int, nbytes: int) -> None:
        self._window, self._offset, self._nbytes, self._at = window, offset, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._nbytes}[whence]
        if begin + offset < 0:
            raise ValueError("before the beginning")
        self._at = begin + offset
        return self._at

    def read(self, count: int | None = -1) -> bytes:
        left = max(self._nbytes - self._at, 0)
        count = left if count is None or count < 0 else min(count, left)
        if count > _READ_NBYTES_MAX:
            raise ValueError(f"a directory of {count} bytes")
        found = self._window.take(self._offset + self._at, count) if count else b""
        self._at += count
        return found
