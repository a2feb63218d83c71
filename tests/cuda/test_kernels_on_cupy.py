"""The filter's kernels as cupy compiles and launches them, on a stream and on each device."""

from __future__ import annotations

from typing import Any

import cupy as cp
import numpy as np
import pytest
from cupy.cuda import runtime

from gpuckpt.devices import kernels
from gpuckpt.planes import split
from tests.cuda.gates import Gate, mode_of
from tests.kernels.memory import leaf_digests

SIZES = [(65536 + 16, 8), (4 * 777, 4), (2 * 5001, 2), (100, 1), (0, 4)]


def on_device(sizes: list[tuple[int, int]]) -> tuple[list[Any], list[Any], Any]:
    """Random chunks, their copies on the device, begun off a multiple of 16, and their layout."""
    rng = np.random.default_rng(1)
    raws = [rng.integers(0, 256, nbytes, dtype=np.uint8) for nbytes, _ in sizes]
    chunks = []
    for raw, (_, width) in zip(raws, sizes, strict=True):
        chunks.append(cp.empty(raw.size + 16, np.uint8)[width : width + raw.size])
        chunks[-1].set(raw)
    addresses = [chunk.data.ptr for chunk in chunks]
    layout = kernels.lay_out(addresses, [n for n, _ in sizes], [w for _, w in sizes])
    return raws, chunks, layout


def room_for(layout: Any) -> tuple[Any, Any, Any]:
    table = cp.asarray(layout.rows.view(np.uint8))
    digests = cp.zeros(layout.leaves * kernels.DIGEST_NBYTES, np.uint8)
    return table, cp.zeros(layout.staged_nbytes, np.uint8), digests


@pytest.mark.parametrize("ordinal", [0, 1])
def test_chunks_go_to_planes_and_back(ordinal):
    if ordinal >= runtime.getDeviceCount():
        pytest.skip("one device")
    with cp.cuda.Device(ordinal):
        raws, chunks, layout = on_device(SIZES)
        table, staged, digests = room_for(layout)
        cp.cuda.Device().synchronize()
        stream = cp.cuda.Stream(non_blocking=True)
        kernels.filter_chunks(layout, table, staged, digests, stream)
        stream.synchronize()
        found, leaves = staged.get(), digests.get()
        for chunk in chunks:
            chunk.fill(0)
        digests.fill(0)
        cp.cuda.Device().synchronize()
        kernels.unfilter_chunks(layout, table, staged, digests, stream)
        stream.synchronize()
        again = [chunk.get() for chunk in chunks]
        assert (digests.get() == leaves).all()

    for at, (raw, (_, width)) in enumerate(zip(raws, SIZES, strict=True)):
        planes = split(raw, width, np.empty(raw.size, np.uint8))
        for place, plane in zip(layout.planes(at), planes, strict=True):
            assert (found[place] == plane).all()
        assert leaves[layout.digests(at)].tobytes() == leaf_digests(raw)
        assert (again[at] == raw).all()


def test_a_launch_stands_in_its_stream_and_waits_for_nothing(standin_settings):
    _, _, layout = on_device(SIZES)
    table, staged, digests = room_for(layout)
    kernels.filter_chunks(layout, table, staged, digests, cp.cuda.Stream.null)  # compiles it
    cp.cuda.Device().synchronize()
    digests.fill(0)
    cp.cuda.Device().synchronize()
    stream = cp.cuda.Stream(non_blocking=True)
    gate = Gate(stream, seconds=0.3 if mode_of(standin_settings) == "eager" else 20)
    kernels.filter_chunks(layout, table, staged, digests, stream)
    launched_before_it_opened = not gate.is_open
    gate.open()
    stream.synchronize()
    gate.join()
    assert digests.get().any()
    assert launched_before_it_opened or mode_of(standin_settings) == "eager"


def test_nothing_to_do_launches_nothing():
    layout = kernels.lay_out([], [], [])
    table, staged, digests = room_for(layout)
    kernels.filter_chunks(layout, table, staged, digests, cp.cuda.Stream.null)
    kernels.unfilter_chunks(layout, table, staged, digests, cp.cuda.Stream.null)


def test_memory_that_is_too_small_or_of_another_kind_is_refused():
    _, _, layout = on_device(SIZES)
    table, staged, digests = room_for(layout)
    for wrong in (
        staged[:-1],
        staged[1:],
        staged.view(np.uint16),
        cp.zeros(2 * staged.size, "u1")[::2],
    ):
        with pytest.raises(AssertionError):
            kernels.filter_chunks(layout, table, wrong, digests, cp.cuda.Stream.null)
