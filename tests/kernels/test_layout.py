"""The table of chunks: where each has its planes, summaries and digests."""

from __future__ import annotations

import pytest

from gpuckpt.devices import kernels
from gpuckpt.layout import LEAF_NBYTES
from gpuckpt.plan import SUMMARY_NBYTES

SIZES = [6, 0, LEAF_NBYTES + 8, 33]
WIDTHS = [2, 4, 8, 1]


def test_summaries_and_planes_follow_each_other_without_overlap():
    layout = kernels.lay_out(SIZES, WIDTHS)
    count, stride, first = LEAF_NBYTES // 8 + 1, LEAF_NBYTES // 8 + 16, 4 * 80
    planes = [layout.planes(at) for at in range(4)]
    rest = first + 32

    assert [layout.summaries(at) for at in range(4)] == [
        slice(0, 80),
        slice(80, 80),
        slice(80, 240),
        slice(240, 320),
    ]
    assert planes[0] == [slice(first, first + 3), slice(first + 16, first + 19)]
    assert planes[1] == [slice(rest, rest)] * 4
    assert planes[2] == [slice(rest + k * stride, rest + k * stride + count) for k in range(8)]
    assert planes[3] == [slice(rest + 8 * stride, rest + 8 * stride + 33)]
    assert layout.staged_nbytes == rest + 8 * stride + 48
    assert layout.leaves == 4
    assert [layout.digests(at) for at in range(4)] == [
        slice(0, 1),
        slice(1, 1),
        slice(1, 3),
        slice(3, 4),
    ]


def test_a_layout_may_begin_later_and_leave_summaries_out():
    bare = kernels.lay_out(SIZES, WIDTHS, summaries=False)
    later = kernels.lay_out(SIZES, WIDTHS, start=4096)
    both = kernels.lay_out(SIZES, WIDTHS)
    assert bare.planes(0)[0].start == 0
    assert bare.staged_nbytes == both.staged_nbytes - 4 * 80
    assert later.staged_nbytes == both.staged_nbytes + 4096
    for at in range(4):
        assert later.summaries(at).start == both.summaries(at).start + 4096
        assert later.planes(at)[-1].stop == both.planes(at)[-1].stop + 4096


def test_a_layout_of_nothing_and_one_that_cuts_an_element():
    assert kernels.lay_out([], [], start=16).staged_nbytes == 16
    with pytest.raises(AssertionError, match="cut"):
        kernels.lay_out([7], [2])
    with pytest.raises(AssertionError):
        kernels.lay_out([6], [3])
    with pytest.raises(AssertionError):
        kernels.lay_out([6], [2], start=8)


def test_rows_are_as_the_kernels_read_them():
    assert kernels.CHUNK.itemsize == 80
    assert kernels.CHUNK.fields is not None
    assert kernels.CHUNK.fields["kind"][1] == 76
    assert kernels.SUMMARY.itemsize == SUMMARY_NBYTES == 80
