"""The default streams, legacy and per thread, and what events tell of time."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cupy as cp
import numpy as np
import pytest
from cupy.cuda import runtime

from tests.cuda.gates import Gate
from tests.cuda.test_standin import MIB, Foreign, copy_out, pinned

LEGACY = cp.cuda.Stream.null
OWN = cp.cuda.Stream.ptds


def test_a_thread_has_a_default_stream_of_its_own(standin_settings):
    if standin_settings is None:
        pytest.skip("a first launch may wait for all streams of a GPU")
    opened = threading.Event()
    done = []

    def beside() -> None:
        OWN.launch_host_func(lambda _: opened.wait(30), None)
        done.append(OWN.record())
        OWN.synchronize()

    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(beside)
        device, host = cp.cuda.Stream(non_blocking=True), pinned(MIB)
        with device:
            source = cp.full(MIB, 4, np.uint8)
        device.synchronize()
        copy_out(host.ctypes.data, source, OWN)
        OWN.synchronize()  # not stopped by the other thread's
        assert (host == 4).all()
        assert not stopped.done()
        opened.set()
        stopped.result(30)
    assert done[0].done


def test_a_threads_default_stream_outlives_it():
    source, host = cp.full(MIB, 5, np.uint8), pinned(MIB)
    cp.cuda.Device().synchronize()
    thread = threading.Thread(target=copy_out, args=(host.ctypes.data, source, OWN))
    thread.start()
    thread.join()
    cp.cuda.Device().synchronize()
    assert (host == 5).all()


def test_the_legacy_stream_comes_after_a_threads_own_and_before_it():
    device, host = cp.zeros(MIB, np.uint8), pinned(MIB)
    cp.cuda.Device().synchronize()
    gate = Gate(OWN)
    device.data.memset_async(6, MIB, OWN)
    copy_out(host.ctypes.data, device, LEGACY)
    device.data.memset_async(7, MIB, OWN)
    LEGACY.synchronize()
    assert gate.is_open
    assert (host == 6).all()
    OWN.synchronize()
    assert (device.get() == 7).all()
    gate.join()


def test_the_legacy_streams_two_handles_are_one_stream():
    device, host = cp.zeros(MIB, np.uint8), pinned(MIB)
    cp.cuda.Device().synchronize()
    legacy = cp.cuda.Stream.from_external(Foreign(runtime.streamLegacy))
    device.data.memset_async(8, MIB, LEGACY)
    copy_out(host.ctypes.data, device, legacy)
    legacy.synchronize()
    assert (host == 8).all()


def test_event_query_ends():
    stream = cp.cuda.Stream(non_blocking=True)
    device = cp.full(MIB, 0x22, dtype=np.uint8)
    cp.cuda.Device().synchronize()
    host = pinned(MIB)
    copy_out(host.ctypes.data, device, stream)
    done = stream.record()
    end = time.monotonic() + 30
    while not done.done:
        assert time.monotonic() < end
        time.sleep(0.001)
    assert (host == 0x22).all()


def test_event_orders_two_streams():
    stream = cp.cuda.Stream(non_blocking=True)
    copier = cp.cuda.Stream(non_blocking=True)
    host = pinned(MIB)
    with stream:
        device = cp.zeros(MIB, dtype=np.uint8)
        device += 5
    copier.wait_event(stream.record())
    copy_out(host.ctypes.data, device, copier)
    copier.synchronize()
    assert (host == 5).all()


def events(stream: Any, work: Any) -> tuple[Any, Any]:
    begin, end = cp.cuda.Event(), cp.cuda.Event()
    begin.record(stream)
    work()
    end.record(stream)
    return begin, end


def test_two_events_tell_how_long_the_work_between_them_took():
    stream = cp.cuda.Stream(non_blocking=True)
    before = time.monotonic()
    begin, end = events(stream, lambda: stream.launch_host_func(lambda _: time.sleep(0.05), None))
    end.synchronize()
    took_ms = 1000 * (time.monotonic() - before)
    assert 45 <= cp.cuda.get_elapsed_time(begin, end) <= took_ms + 5


def test_elapsed_time_has_the_order_of_the_events():
    stream = cp.cuda.Stream(non_blocking=True)
    begin, end = events(stream, lambda: stream.launch_host_func(lambda _: time.sleep(0.01), None))
    end.synchronize()
    assert cp.cuda.get_elapsed_time(begin, end) > 0 > cp.cuda.get_elapsed_time(end, begin)


def test_an_event_is_done_once_all_before_it_is(standin_settings):
    stream = cp.cuda.Stream(non_blocking=True)
    unrecorded = cp.cuda.Event()
    assert unrecorded.done
    opened = threading.Event()
    stream.launch_host_func(lambda _: opened.wait(30), None)
    if (standin_settings or {}).get("mode") == "eager":
        opened.set()  # the record below returns only when it is done
    event = stream.record()
    if not opened.is_set():
        assert not event.done
        assert not stream.done
    opened.set()
    event.synchronize()
    assert event.done
    assert stream.done
