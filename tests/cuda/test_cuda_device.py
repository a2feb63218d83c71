"""The CUDA device keeps every device's contract, and is itself where CUDA differs from the CPU."""

from __future__ import annotations

from typing import Any

import cupy as cp
import numpy as np
import pytest
from cupy.cuda import runtime
from hypothesis import given, settings

from gpuckpt import DeviceError, DeviceMemoryError, NotFoundError
from gpuckpt.arrays import gather, scatter
from gpuckpt.devices import Devices
from gpuckpt.devices.cuda import CudaDevice
from tests.cuda.gates import Gate
from tests.devices_contract import Cut, DeviceContract, bytes_of, cuts, numbers

MIB = 1 << 20


class TestCudaDevice(DeviceContract):
    @pytest.fixture
    def device(self):
        yield CudaDevice(0)
        cp.cuda.Device().synchronize()

    def put(self, array: Any) -> Any:
        return cp.asarray(array)

    def get(self, array: Any) -> Any:
        return array.get()


class TestAnotherDevice(TestCudaDevice):
    """The same while the caller's current device is another one."""

    @pytest.fixture
    def device(self):
        if runtime.getDeviceCount() < 2:
            pytest.skip("one device")
        return CudaDevice(1)

    def put(self, array: Any) -> Any:
        with cp.cuda.Device(1):
            return cp.asarray(array)

    def get(self, array: Any) -> Any:
        with cp.cuda.Device(1):
            return array.get()

    def clear(self, array: Any) -> None:
        with cp.cuda.Device(1):
            array[...] = 0

    def test_its_arrays_lie_on_it(self, device):
        frozen = device.freeze([self.put(numbers())], copy=True)
        assert frozen.arrays[0].device.id == 1
        assert cp.cuda.Device().id == 0
        frozen.settle()


def put_bits(array: Any) -> Any:
    """cupy itself makes 0-d bools canonical on their way."""
    bits = np.frombuffer(array.tobytes(), np.uint8)
    return cp.asarray(bits).view(array.dtype).reshape(array.shape)


@given(cuts())
@settings(deadline=None, max_examples=30)
def test_gather_gives_the_bytes_in_c_order(cut: Cut):
    base = numbers(0, cut.dtype, cut.shape)
    out = cp.full(cut.nbytes, 0xEE, np.uint8)
    gather(cut.view(put_bits(base)), cut.start, out)
    assert out.get().tobytes() == bytes_of(cut.view(base))[cut.start : cut.start + cut.nbytes]


@given(cuts())
@settings(deadline=None, max_examples=30)
def test_scatter_does_as_on_the_cpu(cut: Cut):
    expected, data = numbers(1, cut.dtype, cut.shape), numbers(2, np.uint8, (cut.nbytes,))
    target = put_bits(expected)
    scatter(cp.asarray(data), cut.view(target), cut.start)
    scatter(data, cut.view(expected), cut.start)
    assert bytes_of(target.get()) == bytes_of(expected)


@pytest.fixture
def device():
    yield CudaDevice(0)
    cp.cuda.Device().synchronize()


def test_host_memory_is_page_locked_and_exact(device):
    memory = device.host_memory(123_457)
    assert memory.nbytes == 123_457
    assert runtime.pointerGetAttributes(memory.ctypes.data).type == runtime.memoryTypeHost


def test_host_memory_is_given_back(device):
    memory = device.host_memory(MIB)
    address = memory.ctypes.data
    del memory
    assert runtime.pointerGetAttributes(address).type != runtime.memoryTypeHost


def test_host_memory_that_does_not_fit_is_an_error_that_names_the_device(device):
    with pytest.raises(DeviceError, match=r"cuda:0.*page-locked"):
        device.host_memory(1 << 50)
    assert device.host_memory(10).nbytes == 10


def test_room_counts_what_the_callers_pool_keeps_free(device):
    cp.get_default_memory_pool().free_all_blocks()
    before = device.room()
    block = cp.empty(32 * MIB, np.uint8)
    assert before - device.room() >= 28 * MIB
    del block
    assert before - device.room() < MIB


def test_room_leaves_memory_to_the_run(device):
    free, _ = runtime.memGetInfo()
    pooled = cp.get_default_memory_pool().free_bytes()
    assert 0.5 * (free + pooled) < device.room() < 0.95 * (free + pooled)


def test_a_copy_that_does_not_fit_names_the_device_and_leaves_it_usable(device):
    _, total = runtime.memGetInfo()
    with pytest.raises(DeviceMemoryError, match=r"cuda:0.*snapshot='hold'"):
        device.reserve(2 * total)
    frozen = device.freeze([cp.arange(10)], copy=True)
    slot = device.host_memory(80)
    got = device.download(frozen.arrays[0], 0, slot).wait()
    assert got.tobytes() == np.arange(10).tobytes()


def test_a_device_that_is_not_there_is_not_found():
    with pytest.raises(NotFoundError, match="cuda:99"):
        Devices()["cuda:99"]


def test_freezing_does_not_wait_for_the_callers_stream(device, standin_settings):
    if standin_settings and standin_settings["mode"] == "eager":
        pytest.skip("in eager mode each call completes before it returns")
    stream = cp.cuda.Stream(non_blocking=True)
    array = cp.zeros(1000, np.uint8)
    device.reserve(4096)
    cp.cuda.Device().synchronize()
    with stream:
        gate = Gate(stream, seconds=20)
        array += 1
        frozen = device.freeze([array], copy=True)
        frozen.order_update()
        array += 1
        assert not gate.is_open
    gate.open()
    slot = device.host_memory(1000)
    assert set(device.download(frozen.arrays[0], 0, slot).wait()) == {1}
    stream.synchronize()
    gate.join()


def test_order_update_does_not_make_the_host_wait_once_downloads_are_given(
    device, standin_settings
):
    if standin_settings and standin_settings["mode"] == "eager":
        pytest.skip("in eager mode each call completes before it returns")
    stream = cp.cuda.Stream(non_blocking=True)
    array, slot = cp.zeros(1000, np.uint8), device.host_memory(1000)
    cp.cuda.Device().synchronize()
    with stream:
        gate = Gate(stream, seconds=20)
        frozen = device.freeze([array], copy=False)
        transfer = device.download(frozen.arrays[0], 0, slot)
        frozen.end_downloads()
        frozen.order_update()
        array += 1
        assert not gate.is_open
    gate.open()
    assert set(transfer.wait()) == {0}
    stream.synchronize()
    assert set(array.get()) == {1}
    gate.join()
