"""What each of four torch ranks has of sharded tensors: their boxes give the full tensors."""

from __future__ import annotations

import pytest

from tests.ranks.outcomes import run

pytest.importorskip("torch", reason="torch isn't installed")

CHECKS = [
    *("one_axis", "two_axes", "strided", "fsdp", "hsdp", "tensor_parallel"),
    *("fsdp_of_tensor_parallel", "summands", "local_tensors_of_other_sizes"),
    *("meshes_of_some_ranks", "sharded_tensors"),
]


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, str]]:
    """What four gloo processes say of all checks."""
    return run("tests.ranks.gloo_leaves", 4)


def test_every_check_was_made_by_every_rank(outcomes):
    assert [list(outcome) for outcome in outcomes] == [CHECKS] * 4


@pytest.mark.parametrize("check", CHECKS)
def test_each_ranks_shards_are_its_boxes_of_the_full_tensors(outcomes, check):
    for rank, outcome in enumerate(outcomes):
        assert not outcome[check], f"rank {rank}: {outcome[check]}"
