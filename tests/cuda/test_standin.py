"""CuPy itself does what the checkpoint engine asks of it, on the stand-in and on a real GPU.

Where the stand-in is lazy, a copy must not have happened before somebody waits for it: only then
does a forgotten wait fail the other tests.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import cupy as cp
import numpy as np
import pytest
from cupy.cuda import runtime

MIB = 1 << 20
KERNEL = r"""
extern "C" __global__ __launch_bounds__(256)
void reverse_blocks(const unsigned *in, unsigned *out, unsigned n, unsigned add) {
  __shared__ unsigned tile[256];
  const unsigned i = blockIdx.x * 256 + threadIdx.x;
  tile[threadIdx.x] = i < n ? in[i] : 0;
  __syncthreads();
  if (i < n) out[i] = tile[255 - threadIdx.x] + add;
}
template <class T> __global__ void twice(T *a) { a[threadIdx.x] += a[threadIdx.x]; }
extern "C" __global__ void beyond(char *a, unsigned long long by) { a[by] = 1; }
"""
ALONE = """
from tests.cuda_on_cpu import standin
standin.install_from_environment()
from tests.cuda import {} as module
module.{}()
"""


class Foreign:
    """Another library's stream, as CUDA's stream protocol hands it over."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


def random_words(n: int) -> Any:
    return np.random.default_rng(7).integers(0, 2**32, n, dtype=np.uint32)


def pinned(n: int) -> Any:
    array = np.frombuffer(cp.cuda.alloc_pinned_memory(n), np.uint8, n)
    array[:] = 0x11
    return array


@pytest.fixture
def stream():
    return cp.cuda.Stream(non_blocking=True)


@pytest.fixture
def lazy(standin_settings):
    if not standin_settings or standin_settings.get("mode") != "lazy":
        pytest.skip("the stand-in is not lazy")


def copy_out(host: int, array: Any, stream: Any) -> None:
    runtime.memcpyAsync(
        host,
        array.data.ptr,
        array.nbytes,
        runtime.memcpyDeviceToHost,
        stream.ptr,
    )


def test_copy_into_pinned_memory(stream):
    expected = random_words(MIB // 4)
    device = cp.asarray(expected)
    cp.cuda.Device().synchronize()
    host = pinned(MIB)
    copy_out(host.ctypes.data, device, stream)
    done = stream.record()
    done.synchronize()
    assert done.done
    np.testing.assert_array_equal(host.view(np.uint32), expected)


def test_empty_pinned(stream):
    host = pytest.importorskip("cupyx").empty_pinned((16, 64), dtype=np.float32)
    device = cp.full((16, 64), 1.5, dtype=np.float32)
    cp.cuda.Device().synchronize()
    assert device.get(stream=stream, out=host, blocking=False) is host
    stream.synchronize()
    assert (host == 1.5).all()


def test_host_alloc(stream):
    pointer = runtime.hostAlloc(MIB, runtime.hostAllocPortable)
    try:
        device = cp.full(MIB, 0x33, dtype=np.uint8)
        cp.cuda.Device().synchronize()
        copy_out(pointer, device, stream)
        stream.synchronize()
        assert set(ctypes.string_at(pointer, MIB)) == {0x33}
    finally:
        runtime.freeHost(pointer)


def test_host_register(stream):
    host = np.zeros(MIB, dtype=np.uint8)
    runtime.hostRegister(host.ctypes.data, host.nbytes, 0)
    try:
        copy_out(host.ctypes.data, cp.full(MIB, 9, dtype=np.uint8), cp.cuda.Stream.null)
        cp.cuda.Stream.null.synchronize()
        assert (host == 9).all()
    finally:
        runtime.hostUnregister(host.ctypes.data)


def test_pinned_pool_and_copy_in(stream):
    expected = random_words(5000)
    memory = cp.cuda.alloc_pinned_memory(expected.nbytes)
    host = np.frombuffer(memory, np.uint32, expected.size)
    host[:] = expected
    device = cp.empty(expected.size, dtype=np.uint32)
    device.set(host, stream=stream)
    stream.synchronize()
    np.testing.assert_array_equal(device.get(), expected)


def test_destroyed_stream_still_completes():
    device = cp.full(MIB, 0x44, dtype=np.uint8)
    cp.cuda.Device().synchronize()
    host = pinned(MIB)
    stream = cp.cuda.Stream(non_blocking=True)
    copy_out(host.ctypes.data, device, stream)
    del stream
    cp.cuda.Device().synchronize()
    assert (host == 0x44).all()


def test_unowned_memory_and_external_stream(stream):
    device = cp.full(100, 3, dtype=np.uint8)
    cp.cuda.Device().synchronize()
    memory = cp.cuda.UnownedMemory(device.data.ptr, device.nbytes, device)
    view = cp.ndarray((10, 10), np.uint8, cp.cuda.MemoryPointer(memory, 0))
    with cp.cuda.Stream.from_external(Foreign(stream.ptr)) as same:
        view *= 2
        same.synchronize()
    assert (device.get() == 6).all()


def test_host_function(stream):
    called = threading.Event()
    stream.launch_host_func(lambda _: called.set(), None)
    stream.synchronize()
    assert called.wait(30)


def test_wait_in_another_thread(stream):
    device = cp.full(MIB, 0x55, dtype=np.uint8)
    cp.cuda.Device().synchronize()
    host = pinned(MIB)
    copy_out(host.ctypes.data, device, stream)
    done = stream.record()
    waiter = threading.Thread(target=done.synchronize)
    waiter.start()
    waiter.join(30)
    assert not waiter.is_alive()
    assert (host == 0x55).all()


def test_raw_kernel(stream):
    kernel = cp.RawModule(code=KERNEL, options=("-std=c++17",)).get_function("reverse_blocks")
    words = random_words(256 * 40)
    given = cp.asarray(words)
    cp.cuda.Device().synchronize()
    with stream:
        out = cp.empty_like(given)
        kernel((40,), (256,), (given, out, np.uint32(words.size), np.uint32(3)))
        got = out.get()
    np.testing.assert_array_equal(got, words.reshape(40, 256)[:, ::-1].ravel() + np.uint32(3))


def test_template_kernel():
    name = "twice<double>"
    module = cp.RawModule(code=KERNEL, options=("-std=c++17",), name_expressions=(name,))
    values = cp.arange(32, dtype=np.float64)
    module.get_function(name)((1,), (32,), (values,))
    np.testing.assert_array_equal(values.get(), 2.0 * np.arange(32))


def test_kernel_that_does_not_compile():
    module = cp.RawModule(code='extern "C" __global__ void k(int *p) { *p = undeclared; }')
    with pytest.raises(cp.cuda.compiler.CompileException, match="undeclared"):
        module.get_function("k")


def test_launch_beyond_bounds():
    kernel = cp.RawModule(code=KERNEL, options=("-std=c++17",)).get_function("reverse_blocks")
    words = cp.zeros(512, dtype=np.uint32)
    with pytest.raises(cp.cuda.driver.CUDADriverError):
        kernel((1,), (512,), (words, words, np.uint32(512), np.uint32(0)))


def in_a_process(
    function: str, *, module: str = "test_standin", settings: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs what leaves the process or the context broken, or needs more settings."""
    own = os.environ.get("GPUCKPT_STANDIN", "")
    return subprocess.run(
        [sys.executable, "-c", ALONE.format(module, function)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"GPUCKPT_STANDIN": ",".join(filter(None, (own, settings)))},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def copy_lazily() -> None:
    stream = cp.cuda.Stream(non_blocking=True)
    device = cp.full(MIB, 0x22, dtype=np.uint8)
    cp.cuda.Device().synchronize()
    host = pinned(MIB)
    copy_out(host.ctypes.data, device, stream)
    done = stream.record()
    (device + np.uint8(1)).get()  # another stream's work, in whose time it could have been made
    print((host == 0x11).all())
    done.synchronize()
    print((host == 0x22).all())


def test_a_lazy_copy_waits_for_its_event(lazy):
    # apart from other tests, whose memory may be given back late, which runs everything
    done = in_a_process("copy_lazily")
    assert done.stdout.split() == ["True", "True"], done.stderr


def reach_beyond() -> None:
    kernel = cp.RawModule(code=KERNEL, options=("-std=c++17",)).get_function("beyond")
    with cp.cuda.Stream(non_blocking=True) as stream:
        kernel((1,), (1,), (cp.zeros(4096, dtype=np.uint8), np.uint64(1 << 40)))
        try:
            stream.synchronize()
        except runtime.CUDARuntimeError as error:
            print("caught", error, flush=True)
    os._exit(0)


def test_bad_address_is_an_error():
    done = in_a_process("reach_beyond")
    # the checked emulator stops the kernel before the address faults
    assert re.search("caught cudaError(IllegalAddress|LaunchFailure)", done.stdout), done.stderr


def touch_device_memory() -> None:
    device = cp.zeros(4096, dtype=np.uint8)
    cp.cuda.Device().synchronize()
    print("touching", flush=True)
    ctypes.string_at(device.data.ptr, 1)
    print("survived", flush=True)


def test_host_must_not_touch_device_memory(standin_settings):
    if standin_settings is not None and "ospke" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the CPU has no protection keys")
    done = in_a_process("touch_device_memory")
    assert done.stdout == "touching\n"
    assert done.returncode == -signal.SIGSEGV


def test_non_contiguous_copy():
    words = random_words(10_000).reshape(100, 100)
    view = cp.asarray(words)[::3, 1::2]
    np.testing.assert_array_equal(cp.ascontiguousarray(view).get(), words[::3, 1::2])
    np.testing.assert_array_equal(view.get(), words[::3, 1::2])
    np.testing.assert_array_equal(cp.asarray(words).T.get(), words.T)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64, np.complex64, np.bool_])
def test_arithmetic(dtype):
    values = np.arange(50).astype(dtype)
    device = cp.asarray(values)
    np.testing.assert_array_equal((device + device).get(), values + values)
    np.testing.assert_array_equal(cp.concatenate([device, device]).get(), np.tile(values, 2))
    assert bool((device == cp.asarray(values)).all())


def test_out_of_memory():
    free, total = runtime.memGetInfo()
    assert 0 < free <= total
    with pytest.raises(cp.cuda.memory.OutOfMemoryError):
        cp.empty(total + 1, dtype=np.uint8)
    assert (cp.ones(10).get() == 1).all()


def test_a_test_without_room_skips(room_for):
    free, total = runtime.memGetInfo()
    room_for(min(free, MIB))
    with pytest.raises(pytest.skip.Exception, match="of device memory"):
        room_for(total + 1)


def test_free_memory_is_counted(room_for):
    room_for(32 * MIB)
    cp.get_default_memory_pool().free_all_blocks()
    before = runtime.memGetInfo()[0]
    block = cp.cuda.memory.Memory(32 * MIB)
    assert before - runtime.memGetInfo()[0] >= 32 * MIB
    del block
    assert runtime.memGetInfo()[0] >= before


def test_two_devices():
    if runtime.getDeviceCount() < 2:
        pytest.skip("one device")
    words = random_words(MIB // 4)
    first = cp.asarray(words)
    with cp.cuda.Device(1):
        stream = cp.cuda.Stream(non_blocking=True)
        second = cp.asarray(words) + np.uint32(1)
        cp.cuda.Device().synchronize()
        assert (second.device.id, first.device.id) == (1, 0)
        host = pinned(MIB)
        copy_out(host.ctypes.data, second, stream)
        stream.synchronize()
        moved = cp.asarray(first)
        assert moved.device.id == 1
        np.testing.assert_array_equal(moved.get(), words)
    np.testing.assert_array_equal(host.view(np.uint32), words + np.uint32(1))


def test_what_some_modes_leave_out_is_there_and_runs_in_others():
    from tests.cuda_on_cpu import run

    here = Path(__file__).parent
    named = (*run.TIMELESS, *run.WAITS)
    assert [file for file in named if not (here / file).exists()] == []
    assert {run.WHOLE, *run.BESIDES, *run.JITTERED} <= run.MODES.keys()


@pytest.mark.parametrize(
    ("file", "least"), [("test_hold.py", 9), ("test_seal_on_cuda.py", 2), ("test_limits.py", 7)]
)
def test_each_test_runs_in_the_modes_that_are_there_for_it(file, least):
    from tests.cuda_on_cpu import run

    met = set()
    for number in range(30):
        test = f"tests/cuda/{file}::test_{number}"
        modes = [
            mode
            for mode in run.MODES
            if run.runs_in(mode, test)
            and f"--ignore=tests/cuda/{file}" not in run.arguments_of(mode, whole=False)
        ]
        assert len(modes) == least
        assert modes == [mode for mode in run.MODES if run.runs_in(mode, test)]
        met.update(modes)
    assert met == (set(run.MODES) if least > 2 else {run.WHOLE, *run.BESIDES})
