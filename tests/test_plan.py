"""How a state is cut into chunks, and chunks are put together: every byte once, in slots."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuckpt.arena import AREAS, FEWEST_SLOTS, Arena, arena_nbytes
from gpuckpt.census import take_inventory
from gpuckpt.layout import LEAF_NBYTES
from gpuckpt.plan import (
    Plan,
    aligned,
    area_nbytes,
    batch_chunks,
    is_dense,
    largest_nbytes,
    make_plans,
    plan_chunks,
    staged_nbytes,
)
from gpuckpt.spec import Chunk
from tests.strategies import ITEM_NBYTES_MAX, Array, arrays

DIGEST_NBYTES = 16
SIZES = st.sampled_from((1, ITEM_NBYTES_MAX, 100, 1000, 1 << 20))


def plans_of(some: Sequence[Array], at: str, chunk_nbytes: int, *, split: bool) -> dict[str, Plan]:
    """Plans for arrays that lie, one after the other, on the host (`h`) or on a GPU (`0`, `1`)."""
    inventory = take_inventory(list(some))
    by_device: dict[str, list[int]] = {}
    for position, device in enumerate(at[: len(some)]):
        by_device.setdefault("cpu" if device == "h" else f"cuda:{device}", []).append(position)
    return make_plans(
        *(inventory.specs, inventory.roster.strides, by_device),
        chunk_nbytes=chunk_nbytes,
        split=split,
    )


def chunks_of(batches: Sequence[Sequence[Chunk]]) -> list[Chunk]:
    return [chunk for batch in batches for chunk in batch]


@given(arrays())
def test_chunks_cover_every_byte_once_and_cut_no_element(array):
    (spec,) = take_inventory([array]).specs
    for chunk_nbytes in (1, ITEM_NBYTES_MAX, 100, 1 << 20):
        end = 0
        for chunk in plan_chunks([spec], chunk_nbytes=chunk_nbytes):
            assert (chunk.tensor, chunk.start, chunk.nbytes % array.itemsize) == (0, end, 0)
            assert 0 < chunk.nbytes <= max(chunk_nbytes, array.itemsize)
            end += chunk.nbytes
        assert end == array.nbytes


@settings(deadline=None)
@given(
    st.lists(arrays(), max_size=6),
    st.text("h01", min_size=6, max_size=6),
    SIZES,
    st.booleans(),
)
def test_plans_have_every_byte_of_every_tensor_once_and_look_at_each_again(
    some, at, chunk_nbytes, split
):
    plans = plans_of(some, at, chunk_nbytes, split=split)
    found: list[Chunk] = []
    for name, plan in plans.items():
        every = list(plan_chunks(plan.specs, plan.tensors, chunk_nbytes=chunk_nbytes))
        assert plan.device == name
        assert chunks_of(plan.batches) == chunks_of(plan.rereads) == every
        assert {chunk.tensor for chunk in every} <= set(plan.tensors)
        assert all(chunk.nbytes <= plan.chunk_nbytes for chunk in every)
        assert all(plan.width(c) == (plan.specs[c.tensor].width if split else 1) for c in every)
        found += every
    assert sum(chunk.nbytes for chunk in found) == sum(array.nbytes for array in some)
    assert largest_nbytes(plans) == max((p.chunk_nbytes for p in plans.values()), default=0)


@settings(deadline=None)
@given(st.lists(arrays(), max_size=12), st.text("h0", min_size=12, max_size=12), SIZES)
def test_what_comes_together_fits_a_slot_with_all_that_is_said_of_it(some, at, chunk_nbytes):
    for plan in plans_of(some, at, chunk_nbytes, split=True).values():
        room = area_nbytes(plan.chunk_nbytes)
        for batch in plan.batches:
            staged = [
                staged_nbytes(c.nbytes, plan.width(c), c.tensor in plan.strided) for c in batch
            ]
            assert sum(staged) <= room
            assert sum(aligned(chunk.nbytes) for chunk in batch) <= room, "one after the other"
        for chunks in plan.rereads:
            gathered = sum(aligned(c.nbytes) for c in chunks if c.tensor in plan.strided)
            digests = sum(-(-c.nbytes // LEAF_NBYTES) * DIGEST_NBYTES for c in chunks)
            assert gathered + digests <= room


@given(st.integers(1, 1 << 23), st.sampled_from([1, 2, 4, 8]), st.booleans())
def test_an_area_has_room_for_any_chunk_that_is_not_larger(nbytes, width, strided):
    whole = nbytes - nbytes % width
    assert staged_nbytes(whole, width, strided) <= area_nbytes(nbytes)
    assert staged_nbytes(whole, width, strided) >= aligned(whole)
    assert area_nbytes(nbytes) % 64 == 0


@given(st.integers(1, 1 << 23), st.integers(0, 1 << 30), st.integers(1, 8))
def test_an_arena_of_the_least_budget_has_the_fewest_slots(chunk_nbytes, more, workers):
    least = FEWEST_SLOTS * AREAS * area_nbytes(chunk_nbytes)
    nbytes = arena_nbytes(least + more, chunk_nbytes, workers)
    assert least <= nbytes <= least + more
    assert arena_nbytes(least, chunk_nbytes, workers) == least
    if nbytes < 1 << 24:
        arena = Arena(np.empty(nbytes, np.uint8), chunk_nbytes)
        assert arena.count * AREAS * area_nbytes(chunk_nbytes) == nbytes


@given(arrays())
def test_what_numpy_calls_contiguous_is_dense(array):
    inventory = take_inventory([array])
    found = is_dense(inventory.specs[0], inventory.roster.strides[0])
    assert found == (array.flags.c_contiguous or not array.size)


@given(
    st.lists(st.integers(1, 300), max_size=40),
    st.integers(64, 500),
    st.integers(1, 50),
    st.integers(0, 70),
)
def test_batches_keep_every_chunk_in_order_and_none_is_cut_short(sizes, batch_nbytes, most, more):
    chunks = [Chunk(at, 0, nbytes) for at, nbytes in enumerate(sizes)]

    def cost(chunk: Chunk) -> int:
        return aligned(chunk.nbytes + more)

    batches = list(batch_chunks(chunks, cost, batch_nbytes=batch_nbytes, most=most))

    assert chunks_of(batches) == chunks
    for batch in batches:
        assert len(batch) == 1 or sum(map(cost, batch)) <= batch_nbytes
        assert len(batch) <= most
    for one, following in itertools.pairwise(batches):
        together = sum(cost(chunk) for chunk in (*one, following[0]))
        assert together > batch_nbytes or len(one) == most
