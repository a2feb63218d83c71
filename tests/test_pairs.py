"""Tables of copies and those before: where counts, histograms and packed planes lie."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpuckpt.devices import kernels
from gpuckpt.devices.merging import Span
from gpuckpt.devices.pairs import (
    PAIR,
    PIECE,
    SEGMENT,
    lay_out_packing,
    lay_out_survey,
    packing_nbytes,
    survey_nbytes,
)
from gpuckpt.plan import BASED_NBYTES, area_nbytes
from gpuckpt.sparse import is_sparse

TABLE, OUT = 1 << 20, 1 << 30
EDGES = (16, 512, SEGMENT, PIECE, 5 * PIECE, 1 << 19)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int]:
    """Elements and their width."""
    near = st.tuples(st.sampled_from(EDGES), st.integers(-9, 9)).map(sum)
    return draw(near), draw(st.sampled_from(kernels.WIDTHS))


def chunks_of(drawn: list[tuple[int, int]]) -> Any:
    sizes = [count * width for count, width in drawn]
    return kernels.lay_out(sizes, [width for _, width in drawn]).rows


def counts_of(drawn: list[tuple[int, int]], seed: int) -> list[Any]:
    """For each segment and plane some number of bytes, small in some planes."""
    rng = np.random.default_rng(seed)
    found = []
    for count, width in drawn:
        sizes = [min(SEGMENT, count - at) for at in range(0, count, SEGMENT)]
        shares = rng.choice([0, 0.1, 0.25, 0.3, 1], width)
        found.append((np.outer(sizes, shares) // 1).astype(np.uint32))
    return found


@given(st.lists(shapes(), min_size=1, max_size=5))
def test_what_is_said_of_chunks_lies_behind_the_rows_and_overlaps_nowhere(drawn):
    chunks = chunks_of(drawn)
    survey = lay_out_survey(chunks, 1 << 40, 1 << 41, TABLE)
    assert survey.nbytes == survey_nbytes(chunks)
    data = np.zeros(survey.nbytes - survey.rows.nbytes, np.uint8)
    for at, (count, width) in enumerate(drawn):
        for part in (survey.counts(data, at), survey.histograms(data, at)):
            assert not part.any()
            part[...] = at + 1
        assert survey.counts(data, at).shape == (-(-count // SEGMENT), width)
        assert survey.histograms(data, at).shape == (2, width, 256)
        row = survey.rows[at]
        assert row["found"] % 16 == row["histograms"] % 16 == 0
        assert row["found"] - TABLE >= survey.rows.nbytes
        assert count // row["every"] < 2 * 4096
    for at in range(len(drawn)):
        assert (survey.counts(data, at) == at + 1).all()
        assert (survey.histograms(data, at) == at + 1).all()
    pieces = [-(-count // PIECE) for count, _ in drawn]
    assert survey.rows["first_piece"].tolist() == np.cumsum([0, *pieces])[:-1].tolist()
    assert survey.pieces == sum(pieces)


def test_a_survey_of_nothing():
    survey = lay_out_survey(chunks_of([]), 0, 0, TABLE)
    assert (survey.nbytes, survey.pieces, len(survey.rows)) == (0, 0, 0)


@given(st.lists(shapes(), min_size=1, max_size=5), st.integers(0, 2**32 - 1), st.data())
def test_planes_are_packed_where_few_bytes_are_set_side_by_side(drawn, seed, data):
    counts = counts_of(drawn, seed)
    picked = data.draw(st.lists(st.integers(0, len(drawn) - 1), min_size=1, unique=True))
    survey = lay_out_survey(chunks_of(drawn), 0, 1 << 41, TABLE)
    packing = lay_out_packing(survey, picked, [counts[at] for at in picked], TABLE, OUT)
    rows = packing.data[: packing.count * PAIR.itemsize].view(PAIR)
    end = 0
    for row, at, places in zip(rows, picked, packing.places, strict=True):
        count, width = drawn[at]
        given_ = packing.data[row["found"] - TABLE :][: 2 * counts[at].nbytes]
        begins = given_.view(np.uint32).reshape(-1, width, 2)
        for k, (place, counted) in enumerate(zip(places, counts[at].T, strict=True)):
            number, there = int(counted.sum()), counted > 0
            assert (place.start, place.count) == (end, count)
            assert end % 16 == 0
            assert bool(row["sparse"] >> k & 1) == is_sparse(number, count)
            if place.packed is None:
                assert row["out"][k] == OUT + end
                end += -(-count // 16) * 16
                continue
            assert row["out"][k] == OUT
            bitmaps = end + 512 * np.arange(there.sum())
            assert begins[there, k, 1].tolist() == bitmaps.tolist()
            assert (begins[~there, k, 1] == 2**32 - 1).all()
            assert place.packed == Span(end + 512 * int(there.sum()), number)
            first = place.packed.start + np.cumsum(counted) - counted
            assert begins[:, k, 0].tolist() == first.tolist()
            end = -(-place.packed.end // 16) * 16
    assert packing.nbytes == end


@given(st.integers(1, 64), st.sampled_from(kernels.WIDTHS), st.integers(0, 2**32 - 1))
def test_a_slot_takes_the_differences_of_its_chunks_and_the_device_their_table(many, width, seed):
    drawn = [(BASED_NBYTES // width, width)] * many
    chunks = chunks_of(drawn)
    survey = lay_out_survey(chunks, 0, 1 << 41, TABLE)
    packing = lay_out_packing(survey, range(many), counts_of(drawn, seed), TABLE, OUT)
    area = area_nbytes(many * BASED_NBYTES)
    assert packing.nbytes <= many * BASED_NBYTES <= area
    assert packing.data.size <= packing_nbytes(area)
