"""What is done with each chunk: 4 MiB of all-MiniLM-L6-v2's weights, in one thread, warm.

`make bench-micro`; two runs are compared by `pytest-benchmark compare`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bench.peers.workloads import minilm_weights
from gpuckpt.arena import AREAS, Arena, Slot
from gpuckpt.coding import Choice, choose_all, choose_by_entropy, choose_nothing, decode, encode
from gpuckpt.deltacoding import delta_pays, encode_delta
from gpuckpt.dtypes import to_numpy
from gpuckpt.fingerprint import checksum, fingerprint
from gpuckpt.plan import area_nbytes
from gpuckpt.planes import join, split
from gpuckpt.statistics import statistics_of

Bytes = npt.NDArray[np.uint8]

CHUNK_NBYTES = 4 << 20
CHOICES: dict[str, Choice] = {
    "raw": choose_nothing,
    "auto": choose_by_entropy,
    "zstd": choose_all,
}


@pytest.fixture(scope="module")
def weights() -> npt.NDArray[np.float32]:
    """The model's numbers, one tensor after the other."""
    arrays = minilm_weights().values()
    return np.concatenate([one.ravel() for one in arrays if one.dtype == np.float32])


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> str:
    """Element types that models have."""
    name: str = request.param
    return name


@pytest.fixture
def chunk(weights: npt.NDArray[np.float32], dtype: str) -> Bytes:
    """A chunk's raw bytes."""
    kind = to_numpy(dtype)
    return weights[: CHUNK_NBYTES // kind.itemsize].astype(kind).view(np.uint8)


@pytest.fixture
def slot() -> Slot:
    """Room to work in."""
    return Arena(np.ones(AREAS * area_nbytes(CHUNK_NBYTES), np.uint8), CHUNK_NBYTES).take()


def test_fingerprint(benchmark: Any, chunk: Bytes) -> None:
    benchmark(fingerprint, chunk.data)


def test_checksum(benchmark: Any, chunk: Bytes) -> None:
    benchmark(checksum, [chunk.data])


def test_statistics(benchmark: Any, chunk: Bytes, dtype: str) -> None:
    benchmark(statistics_of, chunk, dtype)


def test_split(benchmark: Any, chunk: Bytes, dtype: str, slot: Slot) -> None:
    benchmark(split, chunk, to_numpy(dtype).itemsize, slot.planes)


def test_join(benchmark: Any, chunk: Bytes, dtype: str, slot: Slot) -> None:
    planes = split(chunk, to_numpy(dtype).itemsize, slot.planes)
    benchmark(join, planes, slot.raw[: chunk.size])


@pytest.mark.parametrize("codec", CHOICES)
def test_encode(benchmark: Any, chunk: Bytes, dtype: str, slot: Slot, codec: str) -> None:
    width = to_numpy(dtype).itemsize
    encoded = benchmark(encode, [chunk], width, slot, CHOICES[codec])
    benchmark.extra_info["share"] = sum(map(len, encoded.parts)) / chunk.size


def test_decode(benchmark: Any, chunk: Bytes, dtype: str, slot: Slot) -> None:
    encoded = encode([chunk], to_numpy(dtype).itemsize, slot, choose_by_entropy)
    coded = np.frombuffer(b"".join(encoded.parts), np.uint8)
    out = np.ones_like(chunk)
    benchmark(decode, coded, encoded.planes, slot, [out], "the chunk")
    assert out.tobytes() == chunk.tobytes()


def test_does_a_delta_pay(benchmark: Any, chunk: Bytes, dtype: str) -> None:
    pays, _ = benchmark(delta_pays, chunk, stepped(chunk, dtype), to_numpy(dtype).itemsize)
    assert pays


def test_encode_delta(benchmark: Any, chunk: Bytes, dtype: str, slot: Slot) -> None:
    base, width = stepped(chunk, dtype), to_numpy(dtype).itemsize
    room = Arena(np.ones(AREAS * area_nbytes(CHUNK_NBYTES), np.uint8), CHUNK_NBYTES).take()
    encoded = benchmark(encode_delta, chunk, base, width, slot, room)
    benchmark.extra_info["share"] = sum(map(len, encoded.parts)) / chunk.size


def stepped(chunk: Bytes, dtype: str) -> Bytes:
    """The weights a small step away, as a learning rate of 2e-5 leaves them."""
    weights = chunk.view(to_numpy(dtype)).astype(np.float32)
    step = np.float32(2e-5) * np.random.default_rng(7).standard_normal(weights.size, np.float32)
    return (weights - step).astype(to_numpy(dtype)).view(np.uint8)
