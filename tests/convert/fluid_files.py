"""Fluid's files as the C++ of its `save` operator writes them, by struct and Google's protobuf."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

# VarType.Type of paddle/fluid/framework/framework.proto.
TYPES = {"?": 0, "i2": 1, "i4": 2, "i8": 3, "f2": 4, "f4": 5, "f8": 6, "u8": 19, "u1": 20, "i1": 21}


def tensor(array: np.ndarray) -> bytes:
    """TensorToStream."""
    protos = pytest.importorskip("tests.convert.old_protos", reason="needs protobuf")
    kind = array.dtype.str[1:].replace("b1", "?")
    desc: bytes = protos.TensorDesc(data_type=TYPES[kind], dims=array.shape).SerializeToString()
    return struct.pack("<Ii", 0, len(desc)) + desc + array.tobytes()


def lod_tensor(array: np.ndarray, *levels: list[int]) -> bytes:
    """SerializeToStream of a LoDTensor."""
    head = struct.pack("<IQ", 0, len(levels))
    for level in levels:
        head += struct.pack(f"<Q{len(level)}Q", 8 * len(level), *level)
    return head + tensor(array)


def selected_rows(rows: list[int], height: int, value: np.ndarray) -> bytes:
    """SerializeToStream of SelectedRows."""
    head = struct.pack(f"<IQ{len(rows)}qq", 0, len(rows), *rows, height)
    return head + tensor(value)


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    """Files below a folder, by their paths there."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder
