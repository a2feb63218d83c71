"""The CPU device keeps every device's contract, and gathers and scatters as numpy would."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuckpt.arrays import gather, scatter
from gpuckpt.devices import Piece
from gpuckpt.devices.cpu import CpuDevice
from tests.devices_contract import DeviceContract
from tests.shares import checked, download, new_slot, prints_of, reread, share_of, tensor_of, upload
from tests.strategies import ITEM_NBYTES_MAX, arrays, same
from tests.uploads_contract import UploadContract
from tests.views import Cut, bytes_of, cuts, numbers


class TestCpuDevice(DeviceContract, UploadContract):
    @pytest.fixture
    def device(self):
        return CpuDevice()

    def put(self, array):
        return array.copy()

    def get(self, array):
        return array


@settings(max_examples=60, deadline=None)
@given(
    st.lists(arrays(), max_size=6),
    st.booleans(),
    st.booleans(),
    st.integers(ITEM_NBYTES_MAX, 400),
)
def test_what_is_downloaded_can_be_uploaded_again(originals, copy, split, chunk_nbytes):
    device = CpuDevice()
    share = share_of(device, originals, chunk_nbytes=chunk_nbytes, split=split)
    frozen, plan = share.freeze(copy=copy), share.plan
    targets = [np.zeros_like(array) for array in originals]
    for at, chunks in enumerate(plan.batches):
        arrived = frozen.download(at, new_slot(device, chunk_nbytes)).wait()
        rows = list(zip(chunks, arrived, strict=True))
        pieces = [
            Piece(c.nbytes, len(one.planes), c.start, (tensor_of(targets[c.tensor]),))
            for c, one in rows
        ]
        upload(device, pieces, [checked(plan, *row) for row in rows], chunk_nbytes)
    assert all(same(one, other) for one, other in zip(targets, originals, strict=True))
    frozen.release()


@settings(max_examples=40, deadline=None)
@given(st.lists(arrays(), max_size=6), st.booleans(), st.integers(ITEM_NBYTES_MAX, 400))
def test_a_second_look_sees_what_the_first_one_saw(originals, copy, chunk_nbytes):
    device = CpuDevice()
    share = share_of(device, originals, chunk_nbytes=chunk_nbytes)
    frozen = share.freeze(copy=copy)
    found = download(frozen, share)
    assert found == [bytes_of(array) for array in originals]
    assert reread(frozen, share) == prints_of(share, found)
    frozen.release()


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


def test_what_was_held_is_read_once_however_often_it_is_waited_for():
    """A save that fails waits again for what it drops, when the memory may be gone."""
    array = np.arange(600, dtype=np.float32)[::2]
    share = share_of(CpuDevice(), [array])
    frozen, slot = share.freeze(copy=False), share.new_slot()
    downloaded, again = frozen.download(0, slot), frozen.reread(0, share.new_slot())
    first, prints = [bytes(one.planes[0]) for one in downloaded.wait()], list(again.wait())
    array += np.float32(1)
    assert [bytes(one.planes[0]) for one in downloaded.wait()] == first
    assert list(again.wait()) == prints
