"""The CUDA device keeps every device's contract, and is itself where CUDA differs from the CPU."""

from __future__ import annotations

import gc
import threading
from typing import Any

import cupy as cp
import numpy as np
import pytest
from cupy.cuda import runtime
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuckpt import DeviceError, DeviceMemoryError, NotFoundError
from gpuckpt.arrays import scatter
from gpuckpt.devices import Devices, Piece
from gpuckpt.devices.cuda import CudaDevice
from tests.cuda.gates import Gate
from tests.devices_contract import DeviceContract
from tests.shares import (
    checked,
    download,
    new_slot,
    prints_of,
    reread,
    share_of,
    tensor_of,
    upload,
)
from tests.uploads_contract import UploadContract
from tests.views import Cut, bytes_of, cuts, numbers

MIB = 1 << 20


class TestCudaDevice(DeviceContract, UploadContract):
    @pytest.fixture
    def device(self):
        yield CudaDevice(0)
        cp.cuda.Device().synchronize()

    def put(self, array: Any) -> Any:
        return put_bits(array)

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
            return put_bits(array)

    def get(self, array: Any) -> Any:
        with cp.cuda.Device(1):
            return array.get()

    def clear(self, array: Any) -> None:
        with cp.cuda.Device(1):
            array[...] = 0

    def test_its_memory_lies_on_it(self, device):
        def used() -> list[int]:
            counts = []
            for ordinal in (0, 1):
                with cp.cuda.Device(ordinal):
                    counts.append(cp.get_default_memory_pool().used_bytes())
            return counts

        gc.collect()
        before = used()
        device.reserve(8 * MIB)
        after = used()
        # What earlier tests left may go in between.
        assert after[0] <= before[0]
        assert after[1] >= 8 * MIB
        assert device.empty((3,), np.dtype("f4")).device.id == 1
        assert cp.cuda.Device().id == 0


def put_bits(array: Any) -> Any:
    """cupy itself makes 0-d bools canonical on their way."""
    bits = np.frombuffer(array.tobytes(), np.uint8)
    return cp.asarray(bits).view(array.dtype).reshape(array.shape)


@pytest.fixture(scope="module")
def one_for_all():
    yield CudaDevice(0)
    cp.cuda.Device().synchronize()


@given(st.lists(cuts(), max_size=4), st.booleans(), st.booleans(), st.sampled_from([16, 100, 4096]))
@settings(deadline=None, max_examples=40)
def test_a_download_gives_the_bytes_in_c_order_whatever_the_strides(
    one_for_all, some, copy, split, chunk_nbytes
):
    given_ = [numbers(at, cut.dtype, cut.shape) for at, cut in enumerate(some)]
    views = [cut.view(put_bits(base)) for cut, base in zip(some, given_, strict=True)]
    share = share_of(one_for_all, views, chunk_nbytes=chunk_nbytes, split=split)
    frozen = share.freeze(copy=copy)
    expected = [bytes_of(cut.view(base)) for cut, base in zip(some, given_, strict=True)]
    assert download(frozen, share) == expected
    if not copy:
        assert reread(frozen, share) == prints_of(share, expected)
    frozen.end_downloads()
    frozen.release()


@given(cuts().filter(lambda cut: cut.nbytes > 0), st.booleans())
@settings(deadline=None, max_examples=30)
def test_an_upload_does_as_scatter_on_the_cpu(one_for_all, cut: Cut, whole: bool):
    expected, data = numbers(1, cut.dtype, cut.shape), numbers(2, np.uint8, (cut.nbytes,))
    target = put_bits(expected)
    planes = 1 if whole else min(expected.itemsize, 8)
    piece = Piece(cut.nbytes, planes, cut.start, (tensor_of(cut.view(target)),))
    upload(one_for_all, [piece], [data.tobytes()])
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


def test_free_memory_counts_what_the_callers_pool_keeps_free(device):
    cp.get_default_memory_pool().free_all_blocks()
    before = device.free_nbytes()
    block = cp.empty(32 * MIB, np.uint8)
    assert before - device.free_nbytes() >= 28 * MIB
    del block
    assert before - device.free_nbytes() < MIB


def test_there_is_room_for_nine_tenths_of_the_free_memory(device):
    free = runtime.memGetInfo()[0] + cp.get_default_memory_pool().free_bytes()
    assert device.has_room(int(0.85 * free))
    assert not device.has_room(int(0.95 * free))
    device.reserve(MIB)
    assert device.has_room(MIB)


def test_a_copy_that_does_not_fit_names_the_device_and_leaves_it_usable(device):
    _, total = runtime.memGetInfo()
    with pytest.raises(DeviceMemoryError, match=r"cuda:0.*snapshot='hold'"):
        device.reserve(2 * total)
    share = share_of(device, [cp.arange(10)])
    frozen = share.freeze(copy=True)
    assert download(frozen, share) == [np.arange(10).tobytes()]


def test_a_device_that_is_not_there_is_not_found():
    with pytest.raises(NotFoundError, match="cuda:99"):
        Devices()["cuda:99"]


@pytest.fixture
def late(standin_settings):
    """Only where what a stream was given may run later than the call returns."""
    if standin_settings and standin_settings["mode"] == "eager":
        pytest.skip("in eager mode each call completes before it returns")


def prepared(device: CudaDevice, array: Any, *, copy: bool) -> Any:
    """A share for which the device has all the memory and all the kernels that it needs.

    To load one may wait for all streams, also for one that a gate holds up.
    """
    array += 0
    share = share_of(device, [array])
    frozen = share.freeze(copy=copy)
    frozen.end_downloads()
    frozen.release()
    cp.cuda.Device().synchronize()
    return share


@pytest.mark.usefixtures("late")
def test_freezing_does_not_wait_for_the_callers_stream(device):
    stream = cp.cuda.Stream(non_blocking=True)
    array = cp.zeros(1000, np.uint8)
    share = prepared(device, array, copy=True)
    slot = share.new_slot()
    with stream:
        gate = Gate(stream, seconds=20)
        array += 1
        frozen = share.freeze(copy=True)
        frozen.order_update()
        array += 1
        assert not gate.is_open
    gate.open()
    assert download(frozen, share, slot) == [bytes([1] * 1000)]
    stream.synchronize()
    gate.join()


@pytest.mark.usefixtures("late")
def test_order_update_does_not_make_the_host_wait_once_downloads_are_given(device):
    stream = cp.cuda.Stream(non_blocking=True)
    array = cp.zeros(200, np.uint8)
    share, slot = prepared(device, array, copy=False), new_slot(device, 256)
    (chunks,) = share.plan.batches
    with stream:
        gate = Gate(stream, seconds=20)
        frozen = share.freeze(copy=False)
        transfer = frozen.download(0, slot)
        frozen.end_downloads()
        frozen.order_update()
        array += 1
        assert not gate.is_open
    gate.open()
    assert [checked(share.plan, *row) for row in zip(chunks, transfer.wait(), strict=True)] == [
        bytes(200)
    ]
    stream.synchronize()
    assert set(array.get()) == {1}
    gate.join()


@pytest.mark.parametrize("end", ["end_downloads", "release"])
def test_an_update_waits_on_the_host_until_downloads_have_ended(device, end):
    """Also those of a save that has failed, and ends by releasing what it held."""
    array = cp.zeros(1000, np.uint8)
    frozen = prepared(device, array, copy=False).freeze(copy=False)
    ordered = threading.Thread(target=frozen.order_update, daemon=True)
    ordered.start()
    ordered.join(0.1)
    assert ordered.is_alive()
    getattr(frozen, end)()
    ordered.join(30)
    assert not ordered.is_alive()
