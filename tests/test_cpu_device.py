"""The CPU device keeps every device's contract, and gathers and scatters as numpy would."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from gpuckpt.arrays import gather, scatter
from gpuckpt.devices.cpu import CpuDevice
from tests.devices_contract import Cut, DeviceContract, bytes_of, cuts, numbers


class TestCpuDevice(DeviceContract):
    @pytest.fixture
    def device(self):
        return CpuDevice()

    def put(self, array):
        return array.copy()

    def get(self, array):
        return array


@given(cuts())
@settings(deadline=None)
def test_gather_gives_the_bytes_in_c_order(cut: Cut):
    view = cut.view(numbers(0, cut.dtype, cut.shape))
    out = np.full(cut.nbytes, 0xEE, np.uint8)
    gather(view, cut.start, out)
    assert out.tobytes() == bytes_of(view)[cut.start : cut.start + cut.nbytes]


@given(cuts())
@settings(deadline=None)
def test_scatter_undoes_gather_and_leaves_the_rest_alone(cut: Cut):
    base, expected = numbers(1, cut.dtype, cut.shape), numbers(1, cut.dtype, cut.shape)
    data = numbers(2, np.uint8, (cut.nbytes,))
    inside = cut.view(expected)
    packed = bytearray(bytes_of(inside))
    packed[cut.start : cut.start + cut.nbytes] = data.tobytes()
    if inside.size:
        inside[...] = np.frombuffer(packed, inside.dtype).reshape(inside.shape)
    scatter(data, cut.view(base), cut.start)
    assert bytes_of(base) == bytes_of(expected)
