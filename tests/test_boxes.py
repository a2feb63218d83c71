"""What none of some boxes has of another is found, as numpy finds it."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpuckpt.boxes import Box, gap, whole_box

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def cases(draw: Any) -> tuple[tuple[int, ...], list[Box], Box]:
    """A tensor's shape, boxes of it, and one more."""
    shape = draw(shapes)

    def box() -> Box:
        offset = tuple(draw(st.integers(0, extent)) for extent in shape)
        ends = zip(offset, shape, strict=True)
        return Box(offset, tuple(draw(st.integers(0, extent - at)) for at, extent in ends))

    return shape, [box() for _ in range(draw(st.integers(0, 6)))], box()


@given(cases())
def test_a_gap_is_of_elements_that_no_box_has_and_there_is_one_if_there_are_any(case):
    shape, boxes, wanted = case
    lacks = np.zeros(shape, bool)
    lacks[wanted.slices] = True
    for box in boxes:
        lacks[box.slices] = False
    found = gap(boxes, wanted)
    assert (found is not None) == bool(lacks.any())
    if found is not None:
        assert found.count
        assert lacks[found.slices].all()


def test_slabs_of_many_ranks_lack_nothing_or_the_one_that_is_left_out():
    slabs = [Box((4 * at, 0), (4, 7)) for at in range(1000)]
    assert gap(slabs, whole_box((4000, 7))) is None
    del slabs[617]
    assert gap(slabs, whole_box((4000, 7))) == Box((2468, 0), (4, 7))
