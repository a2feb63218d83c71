"""Where a worker's CPU time goes, operation by operation, for a chunk of 4 MiB.

One thread takes the chunks of a state that is larger than its caches through
all operations in a save's order, and through a restore's.  Time is the
thread's CPU time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.scaling.states import weights
from bench.timing import spread
from gpuckpt.arena import AREAS, Arena, Slot
from gpuckpt.coding import Samples, choose_all, choose_by_entropy, choose_nothing, decode, encode
from gpuckpt.coding import compress as compress_plane
from gpuckpt.fingerprint import checksum, fingerprint
from gpuckpt.layout import CHUNK_NBYTES
from gpuckpt.plan import area_nbytes
from gpuckpt.planes import split
from gpuckpt.statistics import statistics_of
from gpuckpt.stores.blocks import BLOCK_NBYTES, aligned_memory

Bytes = npt.NDArray[np.uint8]
CHOICES = {"raw": choose_nothing, "auto": choose_by_entropy, "zstd": choose_all}
WIDTH = 4
MS = "ms_chunk "  # before the name of an operation


class Laps:
    """Adds up the thread's CPU seconds by operation."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = time.thread_time()

    def mark(self, operation: str) -> None:
        """What was done since the last mark."""
        now = time.thread_time()
        self.seconds[operation] += now - self._last
        self._last = now

    def skip(self) -> None:
        """What was done since the last mark doesn't count."""
        self._last = time.thread_time()


def profile(nbytes: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Milliseconds a chunk for each operation, and GB/s of a core for all, save and restore."""
    (raw,) = weights(nbytes, 1).values()
    chunks = list(raw.view(np.uint8)[: nbytes - nbytes % CHUNK_NBYTES].reshape(-1, CHUNK_NBYTES))
    slot = Arena(np.ones(AREAS * area_nbytes(CHUNK_NBYTES), np.uint8), CHUNK_NBYTES).take()
    block = aligned_memory(BLOCK_NBYTES)
    block[:] = 1
    for codec in CHOICES:
        for what in ("save", "restore"):
            found = [_once(what, codec, chunks, slot, block) for _ in range(rounds + 1)][1:]
            gigabytes = len(chunks) * CHUNK_NBYTES / 1e9
            yield {
                "case": "profile",
                "what": what,
                "codec": codec,
                "chunks": len(chunks),
                "gb_s_core": spread([gigabytes / sum(row.values()) for row in found]),
                **{
                    f"{MS}{name}": spread([1e3 * row[name] / len(chunks) for row in found])
                    for name in found[0]
                },
            }


def _once(what: str, codec: str, chunks: list[Bytes], slot: Slot, block: Bytes) -> dict[str, float]:
    laps = Laps()
    for raw in chunks:
        if what == "save":
            _save(codec, raw, slot, block, laps)
        else:
            _restore(codec, raw, slot, block, laps)
    return dict(laps.seconds)


def _save(codec: str, raw: Bytes, slot: Slot, block: Bytes, laps: Laps) -> None:
    laps.skip()
    fingerprint(raw.data)
    laps.mark("fingerprint")
    statistics_of(raw, "float32")
    laps.mark("statistics")
    tries = CHOICES[codec](Samples(raw, WIDTH, turned=True), raw.size)
    laps.mark("sample")
    parts = [raw.data]
    if any(tries):
        planes = split(raw, WIDTH, slot.planes, turned=True)
        laps.mark("split")
        parts = _compressed(planes, tries, slot)
        laps.mark("zstd")
    checksum(parts)
    laps.mark("checksum")
    at = 0
    for part in parts:
        np.copyto(block[at : at + part.nbytes], np.frombuffer(part, np.uint8))
        at += part.nbytes
    laps.mark("copy into the block")


def _compressed(planes: list[Bytes], tries: Any, slot: Slot) -> list[memoryview]:
    room, parts = slot.coded, []
    for plane, wanted in zip(planes, tries, strict=True):
        length = compress_plane(plane, room, slot.compressor) if wanted else 0
        parts.append(room[:length].data if length else plane.data)
        room = room[length:]
    return parts


def _restore(codec: str, raw: Bytes, slot: Slot, block: Bytes, laps: Laps) -> None:
    coded = encode([raw], WIDTH, slot, CHOICES[codec], turned=True)
    body = np.frombuffer(b"".join(coded.parts), np.uint8)
    out = block[: raw.size]
    laps.skip()
    checksum([body.data])
    laps.mark("checksum")
    decode(body, coded.planes, slot, [out], "the chunk", turned=coded.turned)
    laps.mark("decode")
    fingerprint(out.data)
    laps.mark("fingerprint")
