"""Whichever stream the caller works on: snapshots come after its work, its work after uploads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import cupy as cp
import numpy as np
import pytest

import gpuckpt
from gpuckpt.devices.driver import caller_streams
from gpuckpt.stores.memory import MemoryStore
from tests.cuda.gates import Gate
from tests.cuda.held import (
    FEW,
    checkpoints,
    filled,
    held_up,
    is_saved,
    new_stream,
    torch_on,
)

STREAMS = {
    "legacy": lambda: cp.cuda.Stream.null,
    "per thread": lambda: cp.cuda.Stream.ptds,
    "blocking": cp.cuda.Stream,
    "non-blocking": new_stream,
}


@pytest.fixture(params=STREAMS)
def stream(request):
    return STREAMS[request.param]()


@pytest.fixture(params=["cupy", "torch"])
def current(request, stream):
    """Makes the stream the current one of a library, and cupy's a stream without work."""

    @contextlib.contextmanager
    def block() -> Iterator[None]:
        if request.param == "cupy":
            with stream:
                yield
        else:
            with new_stream(), torch_on(stream):
                yield

    return block


def settle() -> None:
    cp.cuda.Stream.ptds.synchronize()
    cp.cuda.Device().synchronize()


@pytest.mark.parametrize("snapshot", ["copy", "hold"])
def test_a_snapshot_comes_after_the_callers_work(stream, current, snapshot):
    store, array = MemoryStore(), filled(1, FEW)
    with checkpoints(store, snapshot) as ckpt:
        gate = Gate(stream)
        with stream:
            array += np.uint32(1)
        with current():
            ckpt.save(1, {"w": array}).result(60)
        gate.join()
        settle()
    assert is_saved(store, 2)


@pytest.mark.parametrize("snapshot", ["copy", "hold"])
def test_an_update_comes_after_the_snapshot(stream, current, snapshot):
    store, array = MemoryStore(), filled(1, FEW)
    with checkpoints(store, snapshot) as ckpt, ckpt.update(), held_up(ckpt):
        pending = ckpt.save(1, {"w": array})
        with current(), ckpt.update(), stream:
            array += np.uint32(1)
        stream.synchronize()
        pending.result(60)
        settle()
    assert is_saved(store, 1)


def test_a_restore_comes_after_the_callers_work_and_before_what_follows(stream, current):
    store, array = MemoryStore(), filled(1, FEW)
    with checkpoints(store, "copy") as ckpt:
        ckpt.save(1, {"w": array}).result(60)
        gate = Gate(stream)
        with stream:
            array += np.uint32(7)
        with current():
            ckpt.restore({"w": array})
        with stream:
            array += np.uint32(1)
        gate.join()
        settle()
    assert (array.get() == 2).all()


def test_a_snapshot_comes_after_the_work_of_both_libraries():
    store, streams = MemoryStore(), [new_stream(), new_stream()]
    state = {"a": filled(1, FEW), "b": filled(1, FEW)}
    with checkpoints(store, "copy") as ckpt:
        gates = [Gate(stream) for stream in streams]
        for stream, name in zip(streams, state, strict=True):
            with stream:
                state[name] += np.uint32(1)
        with streams[0], torch_on(streams[1]):
            ckpt.save(1, state).result(60)
        for gate in gates:
            gate.join()
        settle()
    loaded = gpuckpt.load("", 1, "cpu", store=store)
    assert (loaded["a"] == 2).all()
    assert (loaded["b"] == 2).all()


@pytest.mark.parametrize("snapshot", ["copy", "hold"])
def test_the_updates_of_both_libraries_come_after_the_snapshot(snapshot):
    store, streams = MemoryStore(), [new_stream(), new_stream()]
    state = {"a": filled(1, FEW), "b": filled(1, FEW)}
    with checkpoints(store, snapshot) as ckpt, ckpt.update(), held_up(ckpt):
        pending = ckpt.save(1, state)
        with streams[0], torch_on(streams[1]), ckpt.update():
            state["a"] += np.uint32(1)
            with streams[1]:
                state["b"] += np.uint32(1)
        for stream in streams:
            stream.synchronize()
        pending.result(60)
    loaded = gpuckpt.load("", 1, "cpu", store=store)
    assert (loaded["a"] == 1).all()
    assert (loaded["b"] == 1).all()


def test_one_stream_of_both_libraries_is_ordered_once():
    stream = new_stream()
    with stream, torch_on(stream):
        assert caller_streams(0) == [stream.ptr]


def test_torch_is_not_initialised_for_it():
    stream: Any = new_stream()
    with stream, torch_on(new_stream(), initialized=False):
        assert caller_streams(0) == [stream.ptr]


def test_another_device_has_a_current_stream_of_its_own():
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one device")
    store = MemoryStore()
    with cp.cuda.Device(1):
        stream, array = new_stream(), filled(1, FEW)
        with stream:
            gate = Gate(stream)
            array += np.uint32(1)
            with cp.cuda.Device(0), checkpoints(store, "copy") as ckpt:
                ckpt.save(1, {"w": array}).result(60)
        gate.join()
        cp.cuda.Device().synchronize()
    assert is_saved(store, 2)
