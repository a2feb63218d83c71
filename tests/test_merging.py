"""Runs of bytes that are copied together."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from gpuckpt.devices.merging import _GAP_NBYTES, _MOST, Span, merged

lengths = st.lists(
    st.tuples(st.sampled_from([0, 1, _GAP_NBYTES, _GAP_NBYTES + 1, 5 << 20]), st.integers(0, 999)),
    max_size=12,
)


def spans_of(drawn: list[tuple[int, int]]) -> list[Span]:
    """Spans with a gap before each."""
    found, at = [], 0
    for gap, nbytes in drawn:
        found.append(Span(at + gap, nbytes))
        at = found[-1].end
    return found


@given(lengths)
def test_a_few_spans_have_all_bytes_and_begin_and_end_with_them(drawn):
    given_ = [span for span in spans_of(drawn) if span.nbytes]
    found = merged(spans_of(drawn))
    assert len(found) <= _MOST
    for one in given_:
        assert sum(all_of.start <= one.start and one.end <= all_of.end for all_of in found) == 1
    assert {span.start for span in found} <= {span.start for span in given_}
    assert {span.end for span in found} <= {span.end for span in given_}


@given(lengths)
def test_only_near_bytes_come_along_where_there_are_few_gaps(drawn):
    given_ = [span for span in spans_of(drawn) if span.nbytes]
    gaps = [b.start - a.end for a, b in itertools.pairwise(given_)]
    if sum(gap > _GAP_NBYTES for gap in gaps) < _MOST:
        more = sum(span.nbytes for span in merged(given_)) - sum(one.nbytes for one in given_)
        assert more == sum(gap for gap in gaps if gap <= _GAP_NBYTES)


def test_the_nearest_come_along_first_where_there_are_many():
    wide = 4 * _GAP_NBYTES
    spans = spans_of([(0, 8), (2 * wide, 8), (wide, 8), (3 * wide, 8), (4 * wide, 8), (wide, 8)])
    assert [span.nbytes for span in merged(spans)] == [8, 16 + wide, 8, 16 + wide]


def test_nothing_is_copied_of_nothing():
    assert merged([]) == merged([Span(3, 0)]) == []


def test_what_lies_after_others_is_moved_as_it_is():
    assert Span(3, 4).after(10) == Span(13, 4)
