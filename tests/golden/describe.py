"""Describe a state as JSON, to the last bit, without the format's help."""

import struct
from hashlib import sha256
from typing import Any

import numpy as np

HEX_NBYTES = 2048  # of a larger array, a digest says what it holds


def describe(state: Any) -> dict[str, Any]:
    """Containers, types, values and arrays of `state`; equal descriptions mean equal states.

    An array that is there twice is listed once.
    """
    arrays: list[dict[str, Any]] = []
    seen: dict[int, int] = {}

    def walk(node: Any) -> Any:
        if isinstance(node, np.ndarray):
            if id(node) not in seen:
                seen[id(node)] = len(arrays)
                arrays.append(describe_array(node))
            return {"array": seen[id(node)]}
        if isinstance(node, dict):
            return {"dict": [[walk(key), walk(child)] for key, child in node.items()]}
        if type(node) in {list, tuple}:
            return {type(node).__name__: [walk(child) for child in node]}
        if hasattr(node, "state_dict"):
            return walk(node.state_dict())
        return describe_value(node)

    return {"state": walk(state), "arrays": arrays}


def describe_array(array: np.ndarray) -> dict[str, Any]:
    data = array.tobytes()
    bits = {"hex": data.hex()} if len(data) <= HEX_NBYTES else {"sha256": sha256(data).hexdigest()}
    return {
        "dtype": describe_dtype(array.dtype),
        "shape": list(array.shape),
        "fortran": bool(array.flags.f_contiguous and not array.flags.c_contiguous),
        **bits,
    }


def describe_dtype(dtype: np.dtype) -> str:
    return dtype.name if dtype.isbuiltin == 2 else dtype.str  # 2: one of ml_dtypes


def describe_value(value: Any) -> dict[str, Any]:
    if isinstance(value, np.generic):
        return {"scalar": describe_dtype(value.dtype), "hex": np.asarray(value).tobytes().hex()}
    kind = type(value).__name__
    if isinstance(value, float):
        return {kind: struct.pack(">d", value).hex()}
    if isinstance(value, complex):
        return {kind: struct.pack(">dd", value.real, value.imag).hex()}
    if isinstance(value, bytes | bytearray):
        return {kind: value.hex()}
    if isinstance(value, str):
        return {kind: ascii(value)}  # JSON would join surrogates
    assert value is None or isinstance(value, bool | int), value
    return {kind: str(value)}
