"""Stream memory operations: a stream writes a word, or stops until a word has a value.

CUDA doesn't see these as dependencies: nothing but the value lets a stopped stream go on, and
streams that share a hardware queue stop together.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any

import cupy as cp
import numpy as np
import pytest

from tests.cuda.test_standin import in_a_process

DRIVER = ctypes.CDLL("libcuda.so.1")
GEQ, EQ, AND, NOR = range(4)
INVALID_VALUE = 1
KERNEL = 'extern "C" __global__ void put(unsigned *a, unsigned v) { *a = v; }'


def wait_value(stream: Any, address: int, value: int, flags: int = GEQ) -> int:
    pointer, where = ctypes.c_void_p(stream.ptr), ctypes.c_uint64(address)
    return int(DRIVER.cuStreamWaitValue32_v2(pointer, where, ctypes.c_uint32(value), flags))


def write_value(stream: Any, address: int, value: int) -> int:
    pointer, where = ctypes.c_void_p(stream.ptr), ctypes.c_uint64(address)
    return int(DRIVER.cuStreamWriteValue32_v2(pointer, where, ctypes.c_uint32(value), 0))


def page_locked(n: int = 1) -> Any:
    words = np.frombuffer(cp.cuda.alloc_pinned_memory(4 * n), np.uint32, n)
    words[:] = 0
    return words


def in_device_memory() -> Any:
    word = cp.zeros(1, np.uint32)
    cp.cuda.Device().synchronize()
    return word


def put(stream: Any, address: int, value: int) -> None:
    """Writes the word by a kernel."""
    function = cp.RawModule(code=KERNEL).get_function("put")
    with stream:
        function((1,), (1,), (np.uint64(address), np.uint32(value)))


def streams(n: int) -> list[Any]:
    return [cp.cuda.Stream(non_blocking=True) for _ in range(n)]


class Stopped:
    """A stream that stops at a word, and a mark that it makes once it goes on."""

    def __init__(self, address: int, value: int = 1, flags: int = GEQ) -> None:
        (self.stream,) = streams(1)
        self.mark = page_locked()
        assert wait_value(self.stream, address, value, flags) == 0
        assert write_value(self.stream, self.mark.ctypes.data, 7) == 0
        self.done = self.stream.record()

    def assert_stopped(self) -> None:
        (other,) = streams(1)
        word = page_locked()
        for n in range(20):  # work of another stream, in the time of which it could have gone on
            write_value(other, word.ctypes.data, n + 1)
            other.synchronize()
            assert word[0] == n + 1
            assert not self.done.done
        assert self.mark[0] == 0

    def assert_goes_on(self) -> None:
        self.done.synchronize()
        assert self.mark[0] == 7


@pytest.fixture
def separate(standin_settings):
    """Streams that don't share a queue; on a GPU nobody can promise that."""
    if not standin_settings or standin_settings.get("aliased"):
        pytest.skip("streams may share a queue here")


@pytest.fixture
def mode(standin_settings):
    return (standin_settings or {}).get("mode", "gpu")


@pytest.mark.parametrize(
    ("flags", "value", "before", "after"),
    [
        pytest.param(GEQ, 5, 4, 5, id="at least"),
        pytest.param(GEQ, 2, 2**32 - 1, 3, id="at least, cyclically"),
        pytest.param(EQ, 5, 6, 5, id="equal"),
        pytest.param(AND, 6, 1, 2, id="a bit of the mask is set"),
        pytest.param(NOR, 2**32 - 2, 1, 0, id="a bit outside the mask is clear"),
    ],
)
def test_a_stream_stops_until_the_host_writes_the_value(separate, flags, value, before, after):
    word = page_locked()
    word[0] = before
    stopped = Stopped(word.ctypes.data, value, flags)
    stopped.assert_stopped()
    word[0] = after
    stopped.assert_goes_on()


def test_a_value_that_is_there_stops_nothing():
    word = page_locked()
    word[0] = 9
    Stopped(word.ctypes.data, 9).assert_goes_on()


def test_the_old_names_do_the_same():
    word, (stream,) = page_locked(), streams(1)
    pointer, where = ctypes.c_void_p(stream.ptr), ctypes.c_uint64(word.ctypes.data)
    assert ctypes.CDLL(None).cuStreamWriteValue32(pointer, where, 3, 0) == 0
    assert ctypes.CDLL(None).cuStreamWaitValue32(pointer, where, 3, EQ) == 0
    stream.synchronize()
    assert word[0] == 3


def test_another_stream_writes_the_value_into_device_memory(separate):
    word = in_device_memory()
    stopped = Stopped(word.data.ptr)
    stopped.assert_stopped()
    (writer,) = streams(1)
    assert write_value(writer, word.data.ptr, 1) == 0
    stopped.assert_goes_on()
    assert word.get().tolist() == [1]


def test_a_copy_on_another_stream_brings_the_value(separate):
    word, source, (writer,) = in_device_memory(), page_locked(), streams(1)
    stopped = Stopped(word.data.ptr)
    stopped.assert_stopped()
    source[0] = 1
    word.set(source, stream=writer)
    stopped.assert_goes_on()


def test_a_kernel_on_another_stream_writes_the_value(separate):
    word, (writer,) = in_device_memory(), streams(1)
    put(writer, word.data.ptr, 0)  # compiles it
    stopped = Stopped(word.data.ptr)
    stopped.assert_stopped()
    put(writer, word.data.ptr, 1)
    stopped.assert_goes_on()


def write_lazily() -> None:
    word, (stream,) = page_locked(), streams(1)
    write_value(stream, word.ctypes.data, 1)
    cp.cuda.Stream.null.synchronize()
    print(word[0])
    stream.record().synchronize()
    print(word[0])


def test_a_lazy_stream_writes_a_value_only_once_it_is_waited_for(mode):
    if mode != "lazy":
        pytest.skip("the stand-in is not lazy")
    done = in_a_process("write_lazily", module="test_stream_values")
    assert done.stdout.split() == ["0", "1"], done.stderr


def test_who_waits_for_a_stopped_stream_leaves_the_others_their_streams(separate):
    word = page_locked()
    stopped = Stopped(word.ctypes.data)
    waiter = threading.Thread(target=stopped.stream.synchronize)
    waiter.start()
    stopped.assert_stopped()
    assert waiter.is_alive()
    word[0] = 1
    waiter.join(30)
    assert not waiter.is_alive()
    assert stopped.mark[0] == 7


def test_a_stopped_stream_keeps_its_order(separate):
    word, marks = page_locked(), page_locked(3)
    stopped = Stopped(word.ctypes.data)
    for i in range(3):
        write_value(stopped.stream, marks.ctypes.data + 4 * i, i + 1)
    (other,) = streams(1)
    other.wait_event(stopped.stream.record())
    after = page_locked()
    write_value(other, after.ctypes.data, 1)
    stopped.assert_stopped()
    assert marks.tolist() == [0, 0, 0]
    assert after[0] == 0
    word[0] = 1
    other.synchronize()
    assert marks.tolist() == [1, 2, 3]
    assert after[0] == 1


@pytest.mark.parametrize("what", ["pageable memory", "half a word"])
def test_a_word_that_a_stream_cannot_wait_for_is_refused(standin_settings, what):
    if standin_settings is None:
        pytest.skip("a GPU may be able to reach pageable memory")
    pageable, words, (stream,) = np.zeros(1, np.uint32), page_locked(2), streams(1)
    address = pageable.ctypes.data if what == "pageable memory" else words.ctypes.data + 2
    assert wait_value(stream, address, 0) == INVALID_VALUE
    assert write_value(stream, address, 0) == INVALID_VALUE


def one_queue() -> None:
    """What comes after a wait for a value waits with it; what came before doesn't."""
    word, before, after = page_locked(), page_locked(), page_locked()
    first, last = streams(2)
    opened = threading.Event()
    # It is still to come, but before; in eager mode it is over when this returns.
    patience = 0.1 if "mode=eager" in os.environ.get("GPUCKPT_STANDIN", "") else 30
    first.launch_host_func(lambda _: opened.wait(patience), None)
    write_value(first, before.ctypes.data, 1)
    wait_value(cp.cuda.Stream(non_blocking=True), word.ctypes.data, 1)
    write_value(last, after.ctypes.data, 1)
    done = last.record()
    opened.set()
    first.synchronize()
    print("before", before[0], "after", after[0], done.done, flush=True)
    waiter = threading.Thread(target=last.synchronize)
    waiter.start()
    waiter.join(0.2)
    print("waits", waiter.is_alive(), after[0], flush=True)
    word[0] = 1
    waiter.join(30)
    print("went on", not waiter.is_alive(), after[0], flush=True)


def test_aliased_streams_stop_together(standin_settings):
    if standin_settings is None:
        pytest.skip("a GPU gives streams to queues as it likes")
    done = in_a_process("one_queue", module="test_stream_values", settings="aliased=1")
    expected = ["before 1 after 0 False", "waits True 0", "went on True 1"]
    assert done.stdout.splitlines() == expected, done.stderr
