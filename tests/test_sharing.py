"""What several ranks hold alike is written once, evenly, in few pieces, whoever works it out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.boxes import Box, gap, whole_box
from gpuckpt.errors import RankError
from gpuckpt.groups import Group
from gpuckpt.groups.meeting import Meeting
from gpuckpt.holdings import Holding, digest, exchanged, pack_holdings, unpack_holdings
from gpuckpt.sharing import sample_of, share_out
from gpuckpt.spreading import PIECE_COUNT, spread
from gpuckpt.stores.memory import MemoryStore
from tests.ranks import run_ranks

extents = st.integers(1, 40_000)
shapes = st.one_of(
    st.tuples(extents),
    st.tuples(st.integers(1, 300), st.integers(1, 3000)),
    st.tuples(st.just(1), st.integers(1, 8), extents),
)
loads = st.lists(st.integers(0, 1 << 20), min_size=1, max_size=12)


def whole(name: str, *shape: int) -> Holding:
    return Holding(name, "float32", shape, whole_box(shape))


def part(name: str, shape: tuple[int, ...], first: int, last: int) -> Holding:
    rest = shape[1:]
    return Holding(name, "float32", shape, Box((first, *(0 for _ in rest)), (last - first, *rest)))


@given(st.lists(shapes, min_size=1, max_size=6), loads)
def test_pieces_are_all_of_each_box_once_and_few(shapes, loads):
    boxes = [whole_box(shape) for shape in shapes]
    found = spread(boxes, [4] * len(boxes), loads)
    assert len(found) == len(loads)
    for at, box in enumerate(boxes):
        pieces = [piece for every in found for position, piece in every if position == at]
        assert sum(piece.count for piece in pieces) == box.count
        assert gap(pieces, box) is None
        assert len(pieces) == 1 or min(piece.count for piece in pieces) >= PIECE_COUNT
    assert sum(map(len, found)) <= len(boxes) + len(loads)


@given(st.lists(shapes, min_size=1, max_size=6), loads)
def test_loads_differ_by_no_more_than_the_largest_that_is_not_cut(shapes, loads):
    boxes = [whole_box(shape) for shape in shapes]
    found = spread(boxes, [4] * len(boxes), loads)
    after = [
        load + sum(4 * piece.count for _, piece in every)
        for load, every in zip(loads, found, strict=True)
    ]
    level = min((sum(after) - sum(high)) / (len(after) - len(high)) for high in _highest(loads))
    unit = max(_unit(shape) for shape in shapes)
    assert all(one <= max(level, load) + 8 * unit for one, load in zip(after, loads, strict=True))


def _highest(loads: list[int]) -> list[list[int]]:
    """Those with the most, so that any others may be the ones that get something."""
    ordered = sorted(loads, reverse=True)
    return [ordered[:count] for count in range(len(ordered))]


def _unit(shape: tuple[int, ...]) -> int:
    """Elements between two places where a box may be cut."""
    extent = next((n for n in shape if n > 1), 1)
    row = int(np.prod(shape)) // extent
    return min(-(-PIECE_COUNT // row), extent) * row


def pieces_of(
    held: Sequence[Sequence[Holding]], leads: Sequence[int] | None = None
) -> list[dict[Holding, list[Box]]]:
    """What each rank writes, but for the samples that all who hold it do."""
    shares = [
        {one: [box for box in boxes if box != sample_of(one.box)] for one, boxes in share.items()}
        for share in share_out(held, leads)
    ]
    return [{one: boxes for one, boxes in share.items() if boxes} for share in shares]


def test_a_thousand_replicas_write_as_many_pieces_as_tensors_and_ranks_together():
    tensors = [whole(f"layers.{at}.w", 4096, 4096) for at in range(20)]
    shares = pieces_of([tensors] * 1000)
    assert sum(map(len, shares)) <= 20 + 1000
    written = [sum(box.count for boxes in one.values() for box in boxes) for one in shares]
    assert sum(written) == 20 * 4096 * 4096
    assert max(written) < 1.03 * sum(written) / 1000


def test_who_holds_much_alone_writes_less_of_what_all_hold():
    common = whole("common", 1024, 1024)
    shares = pieces_of([[common, whole("own", 512, 1024)], [common], [common]])
    written = [sum(box.count for boxes in one.values() for box in boxes) for one in shares]
    assert max(written) - min(written) <= 2 * PIECE_COUNT


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=5))
def test_every_element_is_written_once_by_one_that_holds_it(held):
    tensors = [whole(f"t{at}", 8 + at, PIECE_COUNT // 4) for at in range(6)]
    every = [[tensors[at] for at in sorted(set(one))] for one in held]
    shares = pieces_of(every)
    for one in {one for ones in every for one in ones}:
        boxes = [box for rank, share in enumerate(shares) for box in share.get(one, ())]
        assert sum(box.count for box in boxes) == one.box.count
        assert gap(boxes, one.box) is None
    assert all(set(share) <= set(one) for share, one in zip(shares, every, strict=True))


def test_replicas_of_empty_shards_are_written_by_one():
    shape = (4, 3)
    held = [[part("w", shape, 0, 4)], [part("w", shape, 4, 4)], [part("w", shape, 4, 4)]]
    shares = share_out(held)
    assert [len(share) for share in shares] == [1, 1, 0]


@pytest.mark.parametrize("lacks", [0, 1, 2])
def test_elements_that_nobody_holds_are_named(lacks):
    held = [[part("w", (6, 2), 2 * at, 2 * at + 2)] for at in range(3) if at != lacks]
    with pytest.raises(RankError, match=rf"w\[{2 * lacks}:{2 * lacks + 2}, 0:2\] is held by no"):
        share_out(held)


holding = st.builds(
    lambda name, shape: Holding(name, "bfloat16", shape, whole_box(shape)), st.text(), shapes
)


@given(st.lists(holding, max_size=5))
def test_unpacking_holdings_undoes_packing_them(held):
    assert unpack_holdings(pack_holdings(held)) == held


@pytest.mark.parametrize("kinds", [1, 2, 4])
def test_ranks_that_hold_the_same_tell_it_once(kinds):
    given_: list[list[str]] = []

    def work(group: Group) -> tuple[list[list[Holding]], list[str]]:
        held = [part("w", (4, 8), group.rank % kinds, group.rank % kinds + 1)]

        def gather(what: str, own: str) -> list[str]:
            told = [one.decode() for one in group.all_gather(own.encode(), what=what, timeout=20)]
            if not group.rank:
                given_.append(told)
            return told

        return exchanged(group.rank, held, gather)

    for found, digests in run_ranks(4, work):
        assert digests == [digest(one) for one in found]
        assert [one[0].box.offset[0] for one in found] == [rank % kinds for rank in range(4)]
        assert len({id(one) for one in found}) == kinds
    counts = [sum(map(bool, told)) for told in given_]
    assert counts == ([4] if kinds == 1 else [4, kinds])
    assert given_[0][0] == digest([part("w", (4, 8), 0, 1)])


def test_each_root_gets_all_that_its_ranks_hold():
    held = [[whole("w", 64, 4096), whole("b", 8)]] * 4
    leads = [0, 0, 2, 3]
    rows = [sum(box.shape[0] for box in share[held[0][0]]) for share in pieces_of(held, leads)]
    assert rows == [32, 32, 64, 64]
    shares = share_out(held, leads)
    assert [held[0][1] in share for share in shares] == [True, False, True, True]


def test_replicas_write_one_sample_of_the_largest_that_they_hold_together_on_all_machines():
    held = [[whole("w", 64, 4096), whole("v", 8, 4096)]] * 3
    for leads in (None, [0, 1, 1]):
        for share in share_out(held, leads):
            assert sample_of(held[0][0].box) in share[held[0][0]]
            assert all(box != sample_of(held[0][1].box) for box in share.get(held[0][1], ()))


def test_who_ties_what_another_has_nothing_of_is_told_to_give_one_leaf():
    """Empty arrays share no memory: only the leaf itself says that they are tied."""

    def work(group: Meeting, store: MemoryStore, *, same: bool) -> None:
        own = np.ones((0 if group.rank else 3, 4), np.float32)
        leaves = [gpuckpt.Sharded(own, (3, 4), (3 * group.rank, 0)) for _ in range(2)]
        state = {"head": leaves[0], "tail": leaves[0 if same else 1]}
        with gpuckpt.Checkpointer("", store=store, group=group, memory="64 MiB") as ckpt:
            if same:
                ckpt.save(1, state).result(60)
                return
            with pytest.raises(RankError, match=r"tail.*give all ranks one and the same leaf"):
                ckpt.save(1, state)

    run_ranks(2, partial(work, store=MemoryStore(), same=False))
    store = MemoryStore()
    run_ranks(2, partial(work, store=store, same=True))
    assert gpuckpt.load("", store=store)["tail"].shape == (3, 4)
