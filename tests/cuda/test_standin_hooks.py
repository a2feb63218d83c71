"""What the tests ask of the stand-in itself: counts of work, and calls that fail on request."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cupy as cp
import numpy as np
import pytest
from cupy.cuda import runtime

from tests.cuda.gates import Gate, mode_of
from tests.cuda.test_standin import MIB, copy_out, pinned
from tests.cuda_on_cpu import standin

OUT_OF_MEMORY, ILLEGAL_ADDRESS, LAUNCH_FAILURE, ECC = 2, 700, 719, 214


@pytest.fixture(autouse=True)
def fail(faults):
    """Also for those tests that only count, which a real GPU can't do either."""
    return faults


@pytest.fixture
def stream():
    return cp.cuda.Stream(non_blocking=True)


def counted(work: Any) -> dict[str, int]:
    """What `work` did in this thread, but for nothing."""
    with standin.counting() as counting:
        work()
    return {name: n for name, n in counting.current.items() if n}


# ---- counts -------------------------------------------------------------------------------------


def test_work_is_counted_by_its_kind(stream):
    device, host, other = cp.zeros(MIB, np.uint8), pinned(MIB), cp.cuda.Stream(non_blocking=True)
    event, pageable = cp.cuda.Event(disable_timing=True), np.zeros(MIB, np.uint8)
    device += 1  # compiled
    cp.cuda.Device().synchronize()
    assert counted(lambda: copy_out(host.ctypes.data, device, stream)) == {"copy": 1}
    assert counted(lambda: device.data.memset_async(0, MIB, stream)) == {"copy": 1}
    assert counted(lambda: copy_out(pageable.ctypes.data, device, stream)) == {
        "copy": 1,
        "host_sync": 1,
    }
    assert counted(lambda: device.__iadd__(1)) == {"launch": 1}
    assert counted(lambda: event.record(stream)) == {"event_record": 1}
    assert counted(lambda: other.wait_event(event)) == {"stream_wait": 1}
    assert counted(event.synchronize) == {"host_sync": 1}
    assert counted(stream.synchronize) == {"host_sync": 1}
    assert counted(cp.cuda.Device().synchronize) == {"host_sync": 1}
    assert counted(lambda: event.done) == {}


def test_memory_is_counted_when_the_driver_is_asked_for_it():
    cp.get_default_memory_pool().free_all_blocks()
    with standin.counting() as counting:
        runtime.free(runtime.malloc(MIB))
        runtime.freeHost(runtime.hostAlloc(MIB, 0))
    got = {name: n for name, n in counting.current.items() if n}
    assert got == {"alloc": 1, "free": 1, "host_alloc": 1, "host_free": 1}


def test_a_thread_counts_for_itself_and_for_all(stream):
    host, device = pinned(MIB), cp.zeros(MIB, np.uint8)
    cp.cuda.Device().synchronize()
    with standin.counting() as counting, ThreadPoolExecutor(1) as pool:
        pool.submit(copy_out, host.ctypes.data, device, stream).result()
        copy_out(host.ctypes.data, device, stream)
    assert counting.current["copy"] == 1
    assert counting.total["copy"] == 2
    stream.synchronize()


# ---- faults -------------------------------------------------------------------------------------


def test_the_call_that_was_meant_fails_and_those_beside_it_do_not(fail, stream):
    host, device = pinned(MIB), cp.full(MIB, 3, np.uint8)
    cp.cuda.Device().synchronize()
    fault = fail("cudaMemcpyAsync", error=1, after=1)
    copy_out(host.ctypes.data, device, stream)
    with pytest.raises(runtime.CUDARuntimeError, match="InvalidValue"):
        copy_out(host.ctypes.data, device, stream)
    copy_out(host.ctypes.data, device, stream)
    stream.synchronize()
    assert fault.struck == 1
    assert (host == 3).all()


def test_a_failed_call_does_nothing(fail, stream):
    host, device = pinned(MIB), cp.full(MIB, 3, np.uint8)
    cp.cuda.Device().synchronize()
    fail("cuMemcpyAsync", error=1)
    with pytest.raises(runtime.CUDARuntimeError):
        copy_out(host.ctypes.data, device, stream)
    stream.synchronize()
    assert (host == 0x11).all()


def lose_the_device(fail: Any) -> None:
    fail("cudaMemGetInfo", error=ECC, sticky=True)
    with pytest.raises(runtime.CUDARuntimeError):
        runtime.memGetInfo()


def allocate() -> None:
    runtime.free(runtime.malloc(MIB))


def lock_pages() -> None:
    runtime.freeHost(runtime.hostAlloc(MIB, 0))


def make_stream() -> None:
    # cp.cuda.Stream can't be dropped in peace once its constructor has failed
    runtime.streamDestroy(runtime.streamCreateWithPriority(runtime.streamNonBlocking, 0))


def launch() -> None:
    cp.zeros(4, np.uint8).__iadd__(1)


@pytest.mark.parametrize(
    ("call", "work"),
    [
        ("cuMemAlloc", allocate),
        ("cudaMalloc", allocate),
        ("cudaHostAlloc", lock_pages),
        ("cuMemHostAlloc", lock_pages),
        ("cuLaunchKernel", launch),
        ("cudaEventRecord", lambda: cp.cuda.Event().record()),
        ("cuEventRecord", lambda: cp.cuda.Event().record()),
        ("cudaEventSynchronize", lambda: cp.cuda.Event().synchronize()),
        ("cudaStreamWaitEvent", lambda: cp.cuda.Stream.null.wait_event(cp.cuda.Event())),
        ("cudaStreamSynchronize", cp.cuda.Stream.null.synchronize),
        ("cudaDeviceSynchronize", lambda: cp.cuda.Device().synchronize()),
        ("cudaMemsetAsync", lambda: cp.zeros(4, np.uint8).data.memset_async(0, 4)),
        ("cudaStreamCreateWithPriority", make_stream),
        ("cudaEventCreateWithFlags", cp.cuda.Event),
        ("cudaMemGetInfo", runtime.memGetInfo),
        ("cudaSetDevice", lambda: runtime.setDevice(0)),
        ("cudaGetDeviceCount", runtime.getDeviceCount),
    ],
)
def test_any_call_can_fail(fail, call, work):
    work()
    fault = fail(call, error=OUT_OF_MEMORY)
    with pytest.raises((runtime.CUDARuntimeError, cp.cuda.driver.CUDADriverError)) as caught:
        work()
    assert caught.value.status == OUT_OF_MEMORY
    assert fault.struck == 1
    work()


def test_a_fault_strikes_in_any_thread_and_as_often_as_told(fail):
    fault = fail("cudaStreamSynchronize", error=ECC, times=2)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            error = pool.submit(cp.cuda.Stream.null.synchronize).exception()
            assert isinstance(error, runtime.CUDARuntimeError)
        pool.submit(cp.cuda.Stream.null.synchronize).result()
    assert fault.struck == 2


def test_a_fault_that_never_struck_says_so(fail):
    fault = fail("cudaHostAlloc", error=OUT_OF_MEMORY, after=1)
    lock_pages()
    assert fault.struck == 0
    standin.heal()
    fail("cudaMalloc", error=OUT_OF_MEMORY)  # another one
    lock_pages()
    lock_pages()
    assert fault.struck == 0


@pytest.mark.parametrize("error", [ILLEGAL_ADDRESS, LAUNCH_FAILURE, ECC])
def test_a_lost_device_fails_every_call_until_it_is_healed(fail, stream, error):
    host, device = pinned(MIB), cp.full(MIB, 3, np.uint8)
    event = stream.record()
    cp.cuda.Device().synchronize()
    fail("cudaEventSynchronize", error=error, sticky=True)
    with ThreadPoolExecutor(1) as pool:
        caught: Any = pool.submit(event.synchronize).exception(30)
        assert caught.status == error
    for work in (stream.synchronize, stream.record, lambda: runtime.malloc(1), event.synchronize):
        with pytest.raises(runtime.CUDARuntimeError) as again:
            work()
        assert again.value.status == error
    standin.heal()
    copy_out(host.ctypes.data, device, stream)
    stream.synchronize()
    assert (host == 3).all()


class Behind:
    """A stream that a gate holds up, with a copy behind it."""

    def __init__(self, stream: Any, seconds: float) -> None:
        self.device, self.host = cp.full(MIB, 3, np.uint8), pinned(MIB)
        self.host[:] = 0
        cp.cuda.Device().synchronize()
        self.gate = Gate(stream, seconds)
        copy_out(self.host.ctypes.data, self.device, stream)
        self.done = stream.record()

    def was_made(self) -> bool:
        return bool(self.host.any())


def test_a_lost_device_drops_what_it_had_been_given(fail, stream, standin_settings):
    if mode_of(standin_settings) == "eager":
        pytest.skip("in eager mode each call completes before it returns")
    behind = Behind(stream, seconds=20)
    lose_the_device(fail)
    behind.gate.open()
    with pytest.raises(runtime.CUDARuntimeError):
        behind.done.synchronize()
    behind.gate.join()
    standin.heal()
    assert not behind.was_made()


def test_who_waits_for_a_stream_hears_that_the_device_was_lost(fail, stream, standin_settings):
    if mode_of(standin_settings) == "eager":
        pytest.skip("in eager mode each call completes before it returns")
    behind = Behind(stream, seconds=0.3)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(stream.synchronize)
        lose_the_device(fail)
        caught: Any = waiting.exception(30)
        assert caught.status == ECC
    behind.gate.join()
    standin.heal()  # before the stream goes, which needs its context


def test_a_call_that_is_not_there_cannot_be_told_to_fail(fail):
    with pytest.raises(ValueError, match="cuLaunchKernal"):
        fail("cuLaunchKernal", error=1)
