"""Several ranks save together and restore together; any number of them afterwards."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import gpuckpt
from gpuckpt.commit import open_step, steps
from gpuckpt.errors import RankError
from gpuckpt.groups import Group
from gpuckpt.sharing import SAMPLE_COUNT
from gpuckpt.stores import Store
from gpuckpt.stores.memory import MemoryStore
from tests.ranks import run_ranks

N = 1 << 18


def saver(store: Store, group: Group, **options: Any) -> gpuckpt.Checkpointer:
    options.setdefault("memory", "64 MiB")
    options.setdefault("group_timeout", 20)
    return gpuckpt.Checkpointer("", store=store, group=group, **options)


def replicated(seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "w": random.standard_normal((256, N // 256), np.float32),
        "b": random.standard_normal(16, np.float32),
        "scale": np.array(2.5),
        "lr": 0.1,
        "layers": [{"w": random.standard_normal((64, 1024), np.float32)} for _ in range(3)],
    }


def test_replicas_are_written_once_and_evenly():
    store = MemoryStore()
    state = replicated()

    def work(group: Group) -> int:
        with saver(store, group, codec="raw") as ckpt:
            return ckpt.save(1, state).result(20).raw_nbytes

    assert len(set(run_ranks(4, work))) == 1
    manifest = open_step(store)
    assert manifest.ranks == 4
    written = [part.raw_nbytes for part in manifest.parts]
    whole = sum(v.nbytes for v in [state["w"], state["b"], *(x["w"] for x in state["layers"])])
    sample = SAMPLE_COUNT * 4
    assert sum(written) == whole + 4 * (state["scale"].nbytes + sample)
    assert max(written) < 1.05 * whole / 4


def test_every_rank_resumes_from_what_all_have_saved():
    store = MemoryStore()

    def work(group: Group) -> None:
        state = replicated()
        with saver(store, group) as ckpt:
            for step in (1, 2, 3):
                state["w"] += 1
                ckpt.save(step, state)
        fresh = replicated(1)
        with saver(store, group) as ckpt:
            assert ckpt.resume(fresh) == 3
        np.testing.assert_equal(fresh, state)

    run_ranks(3, work)


def test_a_rank_whose_state_cannot_be_saved_is_named_and_nothing_is_committed():
    store = MemoryStore()

    def work(group: Group) -> None:
        state = replicated()
        with saver(store, group) as ckpt:
            ckpt.save(1, state).result(20)
            if group.rank == 1:
                state["odd"] = object()
                with pytest.raises(gpuckpt.UnsupportedError, match="odd"):
                    ckpt.save(2, state)
                del state["odd"]
            else:
                with pytest.raises(RankError, match="rank 1: UnsupportedError: odd"):
                    ckpt.save(2, state).result(20)
                with pytest.raises(RankError, match="rank 1"):
                    ckpt.wait()
            state["w"] += 1
            ckpt.save(3, state).result(20)

    run_ranks(3, work)
    assert [step for step in range(4) if f"step-{step:012d}.manifest.json" in store.names()] == [
        1,
        3,
    ]
    named = {name for step in (1, 3) for name in open_step(store, step).files}
    assert named | {"step-000000000001.manifest.json", "step-000000000003.manifest.json"} == set(
        store.names()
    )


@pytest.mark.filterwarnings("ignore:step 1 was not saved")
@pytest.mark.parametrize(
    "other",
    [
        {"lr": 0.2},
        {"w": np.zeros((4, 4), np.float32)},
        {"b": np.zeros(16, np.float64)},
        {"layers": [1]},
        {"scale": "one"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_ranks_that_disagree_about_the_state_are_named_and_so_is_the_leaf(other):
    store = MemoryStore()
    (name,) = other

    def work(group: Group) -> None:
        state = replicated() | (other if group.rank == 2 else {})
        with saver(store, group, on_error="warn") as ckpt, pytest.raises(RankError) as raised:
            ckpt.save(1, state).result(20)
        assert raised.value.ranks == (0, 2)
        assert name in str(raised.value)

    run_ranks(3, work)
    assert store.names() == []


def test_replicas_that_have_drifted_apart_are_no_checkpoint():
    store = MemoryStore()

    def work(group: Group) -> None:
        state = replicated()
        with saver(store, group, on_error="warn") as ckpt:
            ckpt.save(1, state).result(20)
            state["w"] += group.rank == 1  # it missed an all-reduce
            with pytest.raises(RankError, match=r"isn't the same on both.*all-reduce") as raised:
                ckpt.save(2, state).result(20)
            assert raised.value.ranks == (0, 1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_ranks(3, work)
    assert steps(store) == [1]


@pytest.mark.parametrize("count", [2048, 4095, 4096, 4097, 20_000])
@pytest.mark.parametrize("dtype", ["f4", "f8", "i1"])
def test_a_replica_of_any_size_comes_back(count, dtype):
    """Also one that is no larger than the sample that all write of the largest."""
    store = MemoryStore()

    def work(group: Group) -> None:
        state = {"w": np.arange(count).astype(dtype)}
        fresh = {"w": np.zeros(count, dtype)}
        with saver(store, group) as ckpt:
            ckpt.save(1, state).result(20)
            assert ckpt.resume(fresh) == 1
        np.testing.assert_equal(fresh, state)

    run_ranks(2, work)
