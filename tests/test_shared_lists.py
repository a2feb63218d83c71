"""Lists of which each rank has some elements, joined: what is nobody's here is another's."""

from __future__ import annotations

from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuckpt.structure import NOBODYS, ConflictError, from_json, join, of_rank

LEAVES = st.integers(-5, 5).map(lambda number: {"value": number})
NODES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda nodes: {"list": nodes})
        | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3).map(
            lambda nodes: {"dict": [list(pair) for pair in nodes.items()]}
        )
    ),
    max_leaves=12,
)


@given(st.lists(NODES, max_size=5), st.data())
def test_lists_that_ranks_share_are_joined_from_any_of_their_elements(nodes, data):
    whole = {"list": nodes}
    ranks = data.draw(st.lists(st.sets(st.integers(0, 4)), min_size=1, max_size=4))
    seen = set().union(*ranks)
    parts = [
        {"list": [node if at in has else NOBODYS for at, node in enumerate(nodes)]} for has in ranks
    ]
    joined = reduce(join, parts)
    wanted = [node if at in seen else NOBODYS for at, node in enumerate(nodes)]
    assert joined == {"list": wanted}
    if seen >= set(range(len(nodes))):
        assert joined == whole
        assert from_json(of_rank(joined, 0)) == from_json(whole)


def test_elements_that_ranks_have_differently_are_no_less_a_conflict():
    with pytest.raises(ConflictError):
        join({"list": [{"value": 1}, NOBODYS]}, {"list": [{"value": 2}, NOBODYS]})
    with pytest.raises(ConflictError):
        join({"list": [NOBODYS]}, {"list": [NOBODYS, NOBODYS]})
