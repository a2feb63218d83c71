"""What states are made of: strategies for `hypothesis`, and what it means to be the same."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

Array = npt.NDArray[Any]

PLAIN = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
    *(name for name in ("float128", "complex256") if hasattr(np, name)),
)
SMALL = tuple(
    name
    for name in (
        *("bfloat16", "int2", "int4", "uint2", "uint4", "float4_e2m1fn"),
        *("float6_e2m3fn", "float6_e3m2fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
    if hasattr(ml_dtypes, name)
)
TIME = ("datetime64[ns]", "datetime64[D]", "timedelta64[25us]", "timedelta64[Y]")
FIXED = ("S1", "S5", "U1", "U3", "V1", "V16")
# No element is larger, so that chunks of this size and more can hold any.
ITEM_NBYTES_MAX = 64


def dtypes() -> st.SearchStrategy[np.dtype[Any]]:
    """Every element type that gpuckpt names, some of them big-endian."""
    own = st.sampled_from([np.dtype(getattr(ml_dtypes, name)) for name in SMALL])
    plain = st.sampled_from(PLAIN).map(np.dtype)
    fixed = st.one_of(
        st.integers(1, ITEM_NBYTES_MAX).map(lambda n: np.dtype(f"S{n}")),
        st.integers(1, ITEM_NBYTES_MAX // 4).map(lambda n: np.dtype(f"U{n}")),
        st.integers(1, ITEM_NBYTES_MAX).map(lambda n: np.dtype(f"V{n}")),
    )
    native = st.one_of(plain, own, st.sampled_from((*TIME, "timedelta64")).map(np.dtype), fixed)
    swapped = st.one_of(plain, own, st.sampled_from(TIME + FIXED).map(np.dtype))
    return st.one_of(native, native, swapped.map(lambda dtype: dtype.newbyteorder(">")))


def shapes(most: int = 9) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of no to four axes, some of them empty."""
    some = st.lists(st.integers(0, most), max_size=4).map(tuple)
    return some.filter(lambda shape: math.prod(shape) <= 400)


@st.composite
def arrays(
    draw: st.DrawFn,
    dtype: st.SearchStrategy[np.dtype[Any]] | None = None,
    shape: st.SearchStrategy[tuple[int, ...]] | None = None,
) -> Array:
    """Arrays of any bits, which lie in memory in any order."""
    kind, extents = (
        draw(dtypes() if dtype is None else dtype),
        draw(shapes() if shape is None else shape),
    )
    order = draw(st.permutations(range(len(extents))))
    gaps = [draw(st.sampled_from((1, 1, 1, 2, -1, -2))) for _ in extents]
    room = [extents[axis] * abs(gaps[axis]) for axis in order]
    memory = np.frombuffer(draw(_bits(kind, int(np.prod(room)))), np.uint8).copy()
    whole = memory.view(kind).reshape(room).transpose(np.argsort(order).tolist())
    every: Any = (*(slice(None, None, gap) for gap in gaps), ...)
    array: Array = whole[every]
    assert array.shape == extents
    if draw(st.booleans()):
        array.flags.writeable = False
    return array


@st.composite
def _bits(draw: st.DrawFn, dtype: np.dtype[Any], count: int) -> bytes:
    """Bytes for elements of a type: any, but where the type itself asks for more."""
    kind = draw(st.sampled_from(("any", "zeros", "same", "normal")))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    nbytes = count * dtype.itemsize
    if dtype.kind == "b":
        return rng.integers(0, 2, nbytes, np.uint8).tobytes()
    if dtype.kind == "U":
        points = rng.integers(0, 0xD800, nbytes // 4).astype(f"{dtype.byteorder}u4")
        return points.tobytes()
    if dtype.name in ("int2", "uint2", "int4", "uint4") or dtype.name.startswith(
        ("float4", "float6")
    ):
        return rng.integers(0, 4, nbytes, np.uint8).tobytes()
    if dtype.kind == "M":  # such as can be printed, and NaT
        times = rng.integers(-(10**6), 10**6, count)
        times[rng.random(count) < 0.1] = np.iinfo(np.int64).min
        return times.astype(f"{dtype.byteorder}i8").tobytes()
    if kind == "zeros":
        return bytes(nbytes)
    if kind == "same":
        return (rng.bytes(dtype.itemsize) * count)[:nbytes]
    if kind == "normal" and dtype.kind == "f" and dtype.itemsize <= 8:
        return rng.standard_normal(count).astype(dtype).tobytes()
    return rng.bytes(nbytes)


def text() -> st.SearchStrategy[str]:
    """Strings of any code points, lone surrogates and pairs of them among these."""
    surrogates = st.text(st.characters(min_codepoint=0xD7FE, max_codepoint=0xE001, categories=None))
    return st.one_of(
        st.text(st.characters(categories=None), max_size=8),
        surrogates.map(lambda some: some[:6]),
        st.sampled_from(("", ".", "a.b", "a", "0", "nan", '["a"]', "\ud800\udc00", "\0")),
    )


def floats() -> st.SearchStrategy[float]:
    """Floats of any bits: NaNs with a payload, zeros and infinities of both signs."""
    special = (0.0, -0.0, float("inf"), float("-inf"), 5e-324, 0.1, 1e308)
    bits = st.binary(min_size=8, max_size=8).map(lambda raw: float(struct.unpack("<d", raw)[0]))
    nans = st.integers(1, 2**51 - 1).map(
        lambda payload: float(struct.unpack("<d", struct.pack("<Q", 0xFFF8 << 48 | payload))[0])
    )
    return st.one_of(st.sampled_from(special), bits, nans)


def scalars() -> st.SearchStrategy[Any]:
    """numpy's scalars of every kind."""
    ours = arrays(dtypes().filter(lambda dtype: dtype.kind not in "SU"), st.just(()))
    ends = st.sampled_from((b"a\0", b"\0", b"\0\0b")).map(np.bytes_)
    words = st.sampled_from(("a\0", "\0", "é\U0001f600", "\ud800", "\ud800\udc00")).map(np.str_)
    return st.one_of(ours.map(lambda array: array[()]), ends, words)


def plain_values() -> st.SearchStrategy[Any]:
    """Leaves that aren't arrays."""
    return st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(-(2**5000), 2**5000),
        st.sampled_from((2**53, 2**53 + 1, -(2**53), -(2**53) - 1, 2**63, 2**64)),
        floats(),
        st.builds(complex, floats(), floats()),
        text(),
        st.binary(max_size=8),
        st.binary(max_size=8).map(bytearray),
        scalars(),
    )


def keys() -> st.SearchStrategy[Any]:
    """Keys of a state's dicts."""
    simple = st.one_of(
        text(),
        st.integers(-3, 3),
        st.integers(),
        st.none(),
        st.booleans(),
        floats().filter(lambda number: not math.isnan(number)),
        st.binary(max_size=3),
    )
    return st.one_of(simple, simple, st.tuples(simple, simple), st.just(()))


@st.composite
def states(draw: st.DrawFn, leaves: st.SearchStrategy[Any] | None = None) -> Any:
    """Nested states, in which some arrays and containers stand more than once."""
    shared = draw(st.lists(arrays(), max_size=2))
    leaf = st.one_of(arrays(), plain_values()) if leaves is None else leaves
    if shared:
        leaf = st.one_of(leaf, st.sampled_from(shared))
    nested = st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.dictionaries(keys(), inner, max_size=4),
            st.lists(inner, max_size=4),
            st.lists(inner, max_size=3).map(tuple),
        ),
        max_leaves=8,
    )
    return draw(st.dictionaries(keys(), nested, max_size=4))


def same(one: Any, other: Any) -> bool:
    """Whether two states are the same bit for bit: values, types, dtypes, shapes, containers.

    Their arrays may lie in memory in different order.
    """
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and _same_arrays(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, np.generic):
        if isinstance(one, bytes | str):
            return bool(one == other) and len(one) == len(other)
        return _same_arrays(np.asarray(one), np.asarray(other))
    if isinstance(one, Mapping):
        return len(one) == len(other) and all(
            same(*pair) and same(one[pair[0]], other[pair[1]])
            for pair in zip(one, other, strict=True)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, float):
        return struct.pack("<d", one) == struct.pack("<d", other)
    if isinstance(one, complex):
        return same((one.real, one.imag), (other.real, other.imag))
    return bool(one == other)


def _same_arrays(one: Array, other: Array) -> bool:
    """Of 80-bit floats, the bytes that fill them up to 128 count for nothing."""
    kinds = [array.dtype.newbyteorder("=") for array in (one, other)]
    if kinds[0] != kinds[1] or one.shape != other.shape:
        return False
    if one.dtype.type is not np.void and _swapped(one) != _swapped(other):
        return False
    rows = [np.frombuffer(array.tobytes(), np.uint8) for array in (one, other)]
    if one.dtype.type in (np.longdouble, np.clongdouble):
        part = slice(6, 16) if one.dtype.byteorder == ">" else slice(0, 10)
        rows = [row.reshape(-1, 16)[:, part] for row in rows]
    return bool(np.array_equal(rows[0], rows[1]))


def _swapped(array: Array) -> bool:
    return array.dtype.byteorder == ">" and array.dtype.itemsize > 1


def memory_order(array: Array) -> tuple[int, ...]:
    """An array's axes from the slowest to the fastest, those of one element left out."""
    axes = [axis for axis, extent in enumerate(array.shape) if extent > 1]
    return tuple(sorted(axes, key=lambda axis: -array.strides[axis]))
