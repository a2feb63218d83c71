"""Chunks that are longer than what is to be in memory are decoded a little at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuckpt.conversion.orbax_chunks import Chunks, grid_of, read_slabs

tensorstore: Any = pytest.importorskip("tensorstore", reason="needs tensorstore")

ZSTD = {"name": "zstd", "configuration": {"level": 1}}
BYTES = {"name": "bytes", "configuration": {"endian": "little"}}


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A shape, that of its chunks, and how many of these are in a shard."""
    shape = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple))
    chunk = tuple(draw(st.integers(1, extent)) for extent in shape)
    return shape, chunk, tuple(draw(st.integers(1, 3)) for _ in shape)


def stored(
    array: np.ndarray, metadata: dict[str, Any], driver: str, *, filled: bool = False
) -> Any:
    """An array in memory as TensorStore has it, opened again as Orbax's are: not to be filled."""
    context = tensorstore.Context({"memory_key_value_store": {}})
    spec: dict[str, Any] = {"driver": driver, "kvstore": {"driver": "memory"}}
    made = {
        **spec,
        "metadata": {"shape": list(array.shape), **metadata},
        "store_data_equal_to_fill_value": True,
    }
    tensorstore.open(made, create=True, context=context).result()[...].write(array).result()
    spec["fill_missing_data_reads"] = filled
    return tensorstore.open(spec, read=True, open=True, context=context).result()


def zarr2(array: np.ndarray, chunk: tuple[int, ...], **more: Any) -> Any:
    facts = {"chunks": list(chunk), "dtype": array.dtype.str, "compressor": None, **more}
    return stored(array, facts, "zarr")


def zarr3(array: np.ndarray, chunk: tuple[int, ...], shard: tuple[int, ...], codecs: Any) -> Any:
    inner = {"chunk_shape": list(chunk), "codecs": codecs}
    facts = {
        "data_type": array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard)}},
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
    }
    return stored(array, facts, "zarr3")


@settings(deadline=None, max_examples=60)
@given(grids(), st.integers(4, 400), st.booleans(), st.booleans())
def test_any_array_comes_slab_by_slab_however_it_is_cut(grid, most, compressed, old):
    shape, chunk, count = grid
    array = np.random.default_rng(math.prod(shape)).random(shape, np.float32)
    shard = tuple(n * m for n, m in zip(chunk, count, strict=True))
    if old:
        found = zarr2(array, chunk, compressor={"id": "zstd", "level": 1} if compressed else None)
    else:
        found = zarr3(array, chunk, shard, [BYTES, ZSTD] if compressed else [BYTES])
    assert grid_of(found) is not None

    slabs = [slab.copy() for slab in read_slabs(found, 4, most)]

    assert b"".join(slab.tobytes() for slab in slabs) == array.tobytes()
    assert max(slab.nbytes for slab in slabs) <= max(most, 4)


@pytest.mark.parametrize(
    "more",
    [
        {"order": "F"},
        {"dtype": ">f4"},
        {"compressor": {"id": "gzip", "level": 1}},
        {"chunks": [9, 3]},
    ],
)
def test_what_is_stored_otherwise_is_tensorstores_to_read(more):
    array = np.random.default_rng(1).random((6, 7), np.float32)
    found = zarr2(array, (4, 3), **more)
    assert grid_of(found) is None
    assert b"".join(slab.tobytes() for slab in read_slabs(found, 4, 12)) == array.tobytes()


def test_chunks_that_may_be_missing_are_tensorstores_to_fill():
    facts = {"chunks": [4, 3], "dtype": "<f4", "compressor": None}
    for filled in (True, False):
        found = stored(np.ones((6, 7), np.float32), facts, "zarr", filled=filled)
        assert (grid_of(found) is None) == filled


@pytest.mark.parametrize("compressed", [True, False])
def test_a_chunk_that_is_missing_or_of_another_length_is_an_error(compressed):
    array = np.random.default_rng(1).random((6, 7), np.float32)
    compressor = {"id": "zstd", "level": 1} if compressed else None
    for change in (None, b"", array[:5].tobytes(), array.tobytes() + b"x" * 4):
        found = zarr2(array, (6, 7), compressor=compressor)
        found.kvstore["0.0"] = change if change is None or not compressed else packed(change)
        grid = grid_of(found)
        assert grid is not None
        chunks = Chunks(found, grid, 4)
        with pytest.raises((LookupError, ValueError)):
            list(map(chunks.gather, slabs_of(found)))


def packed(data: bytes) -> bytes:
    import zstandard

    return bytes(zstandard.ZstdCompressor().compress(data))


def slabs_of(array: Any) -> Any:
    from gpuckpt.conversion.slabs import slabs

    return slabs(tuple(array.shape), 4, 28)
