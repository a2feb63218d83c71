"""The stand-in finds the faults of a copying pipeline that only time brings to light on a GPU.

Each mode that the suite runs in has to find what it is there for; a stand-in that finds nothing
would make every other test of this directory worthless.
"""

from __future__ import annotations

from typing import Any

import cupy as cp
import numpy as np
import pytest
from cupy.cuda import runtime

CHUNK = 1 << 18
CHUNKS = 16
# The mode that must find the fault. Other modes may find it as well.
FOUND_BY = {"no event wait": "lazy", "no stream order": "lazy", "freed too early": "slow"}


class Pipeline:
    """Changes chunks on one stream and copies them out on another, through two pinned buffers."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.compute = cp.cuda.Stream(non_blocking=True)
        self.copier = cp.cuda.Stream(non_blocking=True)
        self.pinned = [cp.cuda.alloc_pinned_memory(CHUNK) for _ in range(2)]
        self.done: list[Any] = [None, None]
        self.held: list[Any] = [None, None]
        self.out: list[Any] = []

    def drain(self, slot: int) -> None:
        if self.done[slot] is None:
            return
        if self.fault != "no event wait":
            self.done[slot].synchronize()
        self.out.append(np.frombuffer(self.pinned[slot], np.uint8, CHUNK).copy())
        self.done[slot] = None

    def send(self, slot: int, chunk: Any) -> None:
        with self.compute:
            changed = chunk ^ np.uint8(0x5A)
            ready = self.compute.record()
        if self.fault != "no stream order":
            self.copier.wait_event(ready)
        source, kind = changed.data.ptr, runtime.memcpyDeviceToHost
        runtime.memcpyAsync(self.pinned[slot].ptr, source, CHUNK, kind, self.copier.ptr)
        self.done[slot] = self.copier.record()
        if self.fault != "freed too early":
            self.held[slot] = changed

    def save(self, device: Any) -> Any:
        for i in range(CHUNKS):
            self.drain(i % 2)
            self.send(i % 2, device[i * CHUNK : (i + 1) * CHUNK])
        self.drain(0)
        self.drain(1)
        cp.cuda.Device().synchronize()
        return np.concatenate(self.out)


def is_right(fault: str) -> bool:
    data = np.random.default_rng(3).integers(0, 256, CHUNKS * CHUNK, dtype=np.uint8)
    device = cp.asarray(data)
    cp.cuda.Device().synchronize()
    return np.array_equal(Pipeline(fault).save(device), data ^ np.uint8(0x5A))


def test_correct_pipeline():
    assert is_right("none")


@pytest.mark.parametrize("fault", FOUND_BY)
def test_fault_is_found(fault, standin_settings):
    settings = standin_settings or {}
    mode = "slow" if settings.get("d2h_gbps") else settings.get("mode")
    if mode != FOUND_BY[fault]:
        pytest.skip(f"this mode need not find it: {FOUND_BY[fault]} does")
    # on a busy machine one attempt of the slow mode may look right by luck
    assert not all(is_right(fault) for _ in range(4))
