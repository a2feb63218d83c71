"""Boxes, runs of C order and how shards are cut: pure arithmetic, against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.boxes import Box, cover, gap, whole_box
from gpuckpt.cutting import (
    BOX_NBYTES_LEAST,
    CHUNK_NBYTES_LEAST,
    check_reshard,
    cut,
    ends,
    longest_chunk,
    rows_for,
)
from gpuckpt.runs import before, boxes_of, pick
from gpuckpt.spec import Spec

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    """Any box of a tensor, some of them empty."""
    spans = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in spans), tuple(b - a for a, b in spans))


@st.composite
def tensors_and_boxes(draw: st.DrawFn, most: int = 5) -> tuple[tuple[int, ...], list[Box]]:
    shape = draw(SHAPES)
    return shape, draw(st.lists(boxes_in(shape), min_size=1, max_size=most))


@given(tensors_and_boxes(1), st.data())
def test_a_run_of_a_tensor_has_a_run_of_a_box(tensor, data):
    shape, (box,) = tensor
    numbers = np.arange(math.prod(shape)).reshape(shape)
    own = np.sort(numbers[box.slices], axis=None)
    first = data.draw(st.integers(0, numbers.size))
    last = data.draw(st.integers(first, numbers.size))
    found = own[before(shape, box, first) : before(shape, box, last)]
    assert found.tolist() == [n for n in own if first <= n < last]


@given(tensors_and_boxes(1), st.data())
def test_a_run_is_its_boxes_one_after_the_other(tensor, data):
    shape, _ = tensor
    numbers = np.arange(math.prod(shape)).reshape(shape)
    first = data.draw(st.integers(0, numbers.size))
    last = data.draw(st.integers(first, numbers.size))
    found = list(boxes_of(shape, first, last))
    assert [n for box in found for n in numbers[box.slices].ravel()] == list(range(first, last))
    assert len(found) < max(2 * len(shape), 2)


@given(tensors_and_boxes(1), st.integers(1, 3), st.data())
def test_what_a_box_has_of_a_run_is_picked_in_order(tensor, item, data):
    shape, (box,) = tensor
    numbers = np.arange(math.prod(shape)).reshape(shape)
    raw = np.repeat(numbers.ravel().astype(np.uint8), item)
    first = data.draw(st.integers(0, numbers.size))
    last = data.draw(st.integers(first, numbers.size))
    wanted = [n for n in numbers[box.slices].ravel() if first <= n < last]
    out = np.full(len(wanted) * item, 255, np.uint8)
    pick(raw[first * item : last * item], first, shape, box, out, item_nbytes=item)
    assert out.tolist() == [n % 256 for n in wanted for _ in range(item)]


@given(tensors_and_boxes(), st.data())
def test_a_cover_has_each_element_that_is_there_once(tensor, data):
    shape, boxes = tensor
    wanted = data.draw(boxes_in(shape))
    counts, there = np.zeros(shape, int), np.zeros(shape, bool)
    for box in boxes:
        there[box.slices] = True
    for at, part in cover(boxes, wanted):
        assert (part & boxes[at]) == part
        counts[part.slices] += 1
    inside = np.zeros(shape, bool)
    inside[wanted.slices] = True
    np.testing.assert_array_equal(counts, (there & inside).astype(int))
    assert (gap(boxes, wanted) is None) == bool((there | ~inside).all())


def test_a_box_that_has_all_is_enough():
    boxes = [Box((0, 0), (2, 4)), Box((0, 0), (4, 4)), Box((2, 0), (2, 4))]
    assert cover(boxes, whole_box((4, 4))) == [(1, whole_box((4, 4)))]


def shard_of(shape: tuple[int, ...], box: Box, dtype: str = "float32") -> Spec:
    return Spec("w", dtype, box.shape, offset=box.offset, whole=shape)


@given(st.sampled_from([(64, 4096), (4096, 64), (300, 7, 900), (2000, 3000), (5, 5)]), st.data())
def test_a_shard_is_cut_into_itself_and_nothing_is_too_small(shape, data):
    box = data.draw(boxes_in(shape))
    spec = shard_of(shape, box)
    found = cut(spec)
    assert sum(part.count for part in found) == box.count
    assert [part & box for part in found if part.count] == [p for p in found if p.count]
    assert len(cover(found, box)) == sum(part.count > 0 for part in found)
    assert len(found) <= max(math.prod(shape) * 4 // BOX_NBYTES_LEAST, 1)


@pytest.mark.parametrize("count", [2, 3, 4, 8, 16])
def test_columns_are_cut_where_other_ranks_begin(count):
    shape = (64, 48_000)
    spec = shard_of(shape, Box((0, 0), (64, 24_000)))
    borders = {part.offset[1] for part in cut(spec)}
    wanted = {at * 48_000 // count for at in range(count) if at * 48_000 // count < 24_000}
    assert wanted <= borders
    assert all(part.shape[0] == 64 for part in cut(spec))


def test_a_shard_is_saved_as_itself_in_tiles_or_as_some_boxes():
    rows = shard_of((4096, 4096), Box((0, 0), (1024, 4096)))
    assert rows_for(rows, "same") == rows_for(rows, "none") == [rows]
    columns = shard_of((4096, 4096), Box((0, 0), (4096, 1024)))
    assert rows_for(columns, "none") == [columns]
    assert [row.box for row in rows_for(columns, "same")] == cut(columns)
    for spec in (rows, columns):
        (row,) = rows_for(spec, "any")
        assert row == spec
        assert row.tiled
        assert not spec.tiled


def test_reshard_is_one_of_four_words():
    assert check_reshard("none") == "none"
    assert check_reshard("auto") == "any"
    assert check_reshard("auto", parts=False) == "same"
    with pytest.raises(gpuckpt.InvalidError, match="reshard is one of auto, any, same, none; got"):
        check_reshard("all")


def test_even_divisions_end_where_torch_and_jax_end_them():
    assert ends(10, [3]) == [4, 8]
    assert ends(10, [2, 5]) == [2, 4, 5, 6, 8]
    assert ends(2, [16]) == [1]
    assert ends(0, [4]) == []


def test_chunks_are_small_against_a_sharded_tensor_and_end_where_its_copys_do():
    whole = (4096, 4096)
    box = Box((0, 0), (512, 4096))
    master, copy = (shard_of(whole, box, dtype) for dtype in ("float32", "bfloat16"))
    assert longest_chunk(master, 4 << 20) == 256 << 10
    assert longest_chunk(copy, 4 << 20) == 128 << 10
    assert longest_chunk(master, 4096) == 4096
    assert longest_chunk(Spec("w", "float32", whole), 4 << 20) == 4 << 20
    assert longest_chunk(shard_of((64, 64), Box((0, 0), (2, 64))), 4 << 20) == CHUNK_NBYTES_LEAST
