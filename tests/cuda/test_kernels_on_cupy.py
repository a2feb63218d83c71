"""The kernels as cupy compiles and launches them, on a stream and on each device."""

from __future__ import annotations

from typing import Any

import cupy as cp
import numpy as np
import pytest
from cupy.cuda import runtime

from gpuckpt.devices import kernels
from gpuckpt.devices.strided import Run, lay_out_runs
from gpuckpt.planes import split
from tests.cuda.gates import Gate, mode_of
from tests.kernels.memory import leaf_digests
from tests.kernels.reference import folded

SIZES = [(65536 + 16, 8), (4 * 777, 4), (2 * 5001, 2), (100, 1), (0, 4)]


class OnDevice:
    """Random chunks off a multiple of 16, bases, their table and what kernels write."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self.raws = [rng.integers(0, 256, nbytes, dtype=np.uint8) for nbytes, _ in SIZES]
        self.befores = [raw ^ np.uint8(3) for raw in self.raws]
        self.chunks = [
            self.put(raw, width) for raw, (_, width) in zip(self.raws, SIZES, strict=True)
        ]
        self.bases = [self.put(before, 5) for before in self.befores]
        self.layout = kernels.lay_out([n for n, _ in SIZES], [w for _, w in SIZES])
        rows = self.layout.rows
        rows["tensor"] = [chunk.data.ptr for chunk in self.chunks]
        rows["base"] = [base.data.ptr for base in self.bases]
        rows["base"][2] = 0
        rows["turned"][1:3] = 1
        self.table = cp.asarray(rows.view(np.uint8))
        self.staged = cp.zeros(self.layout.staged_nbytes, np.uint8)
        self.digests = cp.zeros((self.layout.leaves, kernels.DIGEST_NBYTES), np.uint8)
        cp.cuda.Device().synchronize()

    @staticmethod
    def put(raw: Any, off: int) -> Any:
        array = cp.empty(raw.size + 16, np.uint8)[off : off + raw.size]
        array.set(raw)
        return array

    def launch(self, name: str, stream: Any) -> None:
        size = (self.layout.rows.size, self.layout.leaves)
        staged, digests = self.staged.data.ptr, self.digests.data.ptr
        table = self.table.data.ptr
        if name == "filter":
            kernels.filter_chunks(table, *size, staged, stream)
        elif name == "unfilter":
            kernels.unfilter_chunks(table, *size, staged, digests, stream)
        else:
            kernels.digest_chunks(table, *size, digests, stream)


@pytest.mark.parametrize("ordinal", [0, 1])
def test_chunks_go_to_planes_and_back(ordinal):
    if ordinal >= runtime.getDeviceCount():
        pytest.skip("one device")
    with cp.cuda.Device(ordinal):
        on_device = OnDevice()
        layout = on_device.layout
        stream = cp.cuda.Stream(non_blocking=True)
        on_device.launch("filter", stream)
        on_device.launch("digest", stream)
        stream.synchronize()
        staged, digests = on_device.staged.get(), on_device.digests.get()
        for chunk in on_device.chunks:
            chunk.fill(0)
        on_device.digests.fill(0)
        cp.cuda.Device().synchronize()
        on_device.launch("unfilter", stream)
        stream.synchronize()
        again = [chunk.get() for chunk in on_device.chunks]
        assert (on_device.digests.get() == digests).all()

    for at, (raw, (_, width)) in enumerate(zip(on_device.raws, SIZES, strict=True)):
        written = raw if at == 2 else folded(raw, on_device.befores[at], width)
        planes = split(written, width, np.empty(raw.size, np.uint8), turned=at in {1, 2})
        for place, plane in zip(layout.planes(at), planes, strict=True):
            assert (staged[place] == plane).all()
        said = staged[layout.summaries(at)].view(kernels.SUMMARY)
        assert said["digest"].tobytes() == leaf_digests(raw)
        assert digests[layout.digests(at)].tobytes() == leaf_digests(raw)
        assert (again[at] == raw).all()


def test_strided_runs_are_packed_and_put_back():
    array = cp.arange(90 * 70, dtype=np.float32).reshape(90, 70).T
    wanted = np.ascontiguousarray(array.get())
    packed = cp.zeros(wanted.size, np.float32)
    places = (array.shape, array.strides, array.itemsize)
    run = Run(array.data.ptr, *places, packed.data.ptr, 0, packed.nbytes)
    runs = lay_out_runs([run])
    table = cp.asarray(runs.rows.view(np.uint8))
    cp.cuda.Device().synchronize()
    stream = cp.cuda.Stream(non_blocking=True)
    kernels.gather_runs(table.data.ptr, runs.rows.size, runs.pieces, stream)
    stream.synchronize()
    assert (packed.get().reshape(wanted.shape) == wanted).all()
    packed += 1
    cp.cuda.Device().synchronize()
    kernels.scatter_runs(table.data.ptr, runs.rows.size, runs.pieces, stream)
    stream.synchronize()
    assert (array.get() == wanted + 1).all()


@pytest.mark.parametrize("name", ["filter", "unfilter", "digest"])
def test_a_launch_stands_in_its_stream_and_waits_for_nothing(standin_settings, name):
    kernels.load_kernels()
    on_device = OnDevice()
    stream = cp.cuda.Stream(non_blocking=True)
    gate = Gate(stream, seconds=0.3 if mode_of(standin_settings) == "eager" else 20)
    on_device.launch(name, stream)
    launched_before_it_opened = not gate.is_open
    gate.open()
    stream.synchronize()
    gate.join()
    assert (on_device.staged if name == "filter" else on_device.digests).get().any()
    assert launched_before_it_opened or mode_of(standin_settings) == "eager"


def test_loaded_kernels_are_there_at_once():
    """The second time nothing is compiled, or read, or loaded."""
    kernels.load_kernels()
    before = kernels._kernel.cache_info()
    OnDevice().launch("filter", cp.cuda.Stream.null)
    kernels.load_kernels()
    assert kernels._kernel.cache_info().misses == before.misses


def test_nothing_to_do_launches_nothing():
    stream = cp.cuda.Stream.null
    kernels.filter_chunks(0, 0, 0, 0, stream)
    kernels.unfilter_chunks(0, 0, 0, 0, 0, stream)
    kernels.digest_chunks(0, 0, 0, 0, stream)
    kernels.gather_runs(0, 0, 0, stream)
    kernels.scatter_runs(0, 0, 0, stream)
