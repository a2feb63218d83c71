"""Other ways to code what two states differ by: their bytes, and CPU seconds for them.

The state's bytes, tensor after tensor, in chunks of 4 MiB at most.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from bench.peers.cache import octets
from bench.training.runs import State
from gpuckpt.arena import ZSTD
from gpuckpt.deltas import delta_split
from gpuckpt.planes import split

Bytes = npt.NDArray[np.uint8]
Coder = Callable[[Bytes, Bytes, str, int], float]

CHUNK_NBYTES = 4 << 20


def rivals() -> dict[str, Coder]:
    """By name: bytes for a chunk, the one before, the dtype's name and its width."""
    found = {"bound": _bound, "zstd of XOR": _zstd_of_xor()}
    if importlib.util.find_spec("zipnn"):
        found["ZipNN of XOR"] = _zipnn_of_xor()
    return found


def coded(code: Coder, before: State, state: State) -> dict[str, float]:
    """Bytes of all chunks, and CPU seconds: of the process, since ZipNN has a thread of its own."""
    nbytes, begun = 0.0, time.process_time()
    for now, old, dtype, width in _chunks(before, state):
        nbytes += code(now, old, dtype, width)
    return {"nbytes": nbytes, "cpu_s": time.process_time() - begun}


def _chunks(before: State, state: State) -> Iterator[tuple[Bytes, Bytes, str, int]]:
    for name, array in state.items():
        now, old = octets(array), octets(before[name])
        for at in range(0, now.size, CHUNK_NBYTES):
            end = at + CHUNK_NBYTES
            yield now[at:end], old[at:end], array.dtype.name, array.itemsize


def _bound(now: Bytes, old: Bytes, _: str, width: int) -> float:
    """The order-0 entropy of each plane of the folded differences, added up."""
    planes = delta_split(now, old, width, np.empty_like(now))
    return sum(map(_entropy_nbytes, planes))


def _entropy_nbytes(plane: Bytes) -> float:
    counts = np.bincount(plane, minlength=256)
    counts = counts[counts > 0]
    return float(counts @ (np.log2(plane.size) - np.log2(counts))) / 8


def _zstd_of_xor() -> Coder:
    """Planes of the XOR, each a frame with gpuckpt's own parameters, or as it is."""
    compressor = zstandard.ZstdCompressor(compression_params=ZSTD)

    def code(now: Bytes, old: Bytes, _: str, width: int) -> float:
        different = now ^ old
        planes = split(different, width, np.empty_like(now)) if width > 1 else [different]
        return sum(min(len(compressor.compress(one.data)), one.size) for one in planes)

    return code


def _zipnn_of_xor() -> Coder:
    """ZipNN's own coding of the XOR, in one thread; other types as they are."""
    import zipnn

    coders: dict[str, Any] = {
        kind: zipnn.ZipNN(input_format="byte", bytearray_dtype=kind, threads=1)
        for kind in ("float32", "bfloat16")
    }

    def code(now: Bytes, old: Bytes, dtype: str, _: int) -> float:
        if dtype not in coders:
            return now.size
        return len(coders[dtype].compress(bytearray((now ^ old).data)))

    return code
