"""`gpuckpt.open`: tensors, and parts of them, are read when they are asked for, and checked."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.errors import (
    AuthenticationError,
    ClosedError,
    CorruptError,
    InvalidError,
    NotFoundError,
)
from gpuckpt.groups import Group
from gpuckpt.stores.memory import MemoryStore
from tests.ranks import run_ranks
from tests.resharding import CountingStore
from tests.strategies import arrays, same, shapes


def state() -> dict[str, Any]:
    random = np.random.default_rng(3)
    w = random.standard_normal((400, 50)).astype(np.float32)
    return {
        "model": {"w": w, "tied": w, "half": w[:30].astype(ml_dtypes.bfloat16)},
        "list": [np.array(2.5), 7, "word"],
        "none": np.empty((0, 4)),
        "fortran": np.asfortranarray(np.arange(60).reshape(3, 4, 5)),
    }


@pytest.fixture
def store():
    found = CountingStore()
    gpuckpt.save("", state(), 5, epoch=2, metrics={"loss": 0.25}, store=found)
    return found


def test_it_is_used_as_a_safetensors_file_is(store):
    with gpuckpt.open("", store=store) as file:
        assert file.keys() == [
            *("model.w", "model.tied", "model.half", "list.0", "none", "fortran"),
        ]
        assert list(file) == file.keys()
        assert len(file) == 6
        assert "model.w" in file
        assert "model" not in file
        assert same(file.get_tensor("model.half"), state()["model"]["half"])
        assert same(file.get_tensor("model.tied"), state()["model"]["w"])
        assert same(file.get_tensor("list.0"), np.array(2.5))
        assert same(file.get_tensor("none"), np.empty((0, 4)))
        part = file.get_slice("model.w")
        assert (part.get_shape(), part.get_dtype()) == ([400, 50], "float32")
        assert same(part[10:20, ::7], state()["model"]["w"][10:20, ::7])
        assert repr(part) == "<model.w: float32 [400, 50]>"
        assert file.values() == {"list.1": 7, "list.2": "word"}
        known = file.metadata()
    assert (known["step"], known["epoch"], known["metrics.loss"]) == ("5", "2", "0.25")
    assert all(isinstance(text, str) for text in known.values())


def test_a_whole_tensor_lies_in_memory_as_it_was_saved(store):
    with gpuckpt.open("", store=store) as file:
        assert file.get_tensor("fortran").flags.f_contiguous
        part = file.get_slice("fortran")[1]
    assert same(part, state()["fortran"][1])
    assert part.flags.c_contiguous


def test_nothing_is_read_before_it_is_asked_for(store):
    store.read_nbytes = 0
    with gpuckpt.open("", store=store) as file:
        part = file.get_slice("model.w")
        assert store.read_nbytes == 0
        part[5]
        first = store.read_nbytes
        file.get_tensor("model.half")
    assert 0 < first < store.read_nbytes


def test_only_the_chunks_that_are_needed_are_read():
    store = CountingStore()
    large = np.random.default_rng(0).integers(0, 256, (64, 1 << 20), np.uint8)
    gpuckpt.save("", {"w": large}, codec="raw", store=store)
    store.read_nbytes = 0

    with gpuckpt.open("", store=store) as file:
        part = file.get_slice("w")
        assert same(part[9:11, 5:7], large[9:11, 5:7])
        assert store.read_nbytes == 4 << 20
        assert same(part[-1], large[-1])
        assert store.read_nbytes == 8 << 20
        assert part[3:3].shape == (0, 1 << 20)
        assert store.read_nbytes == 8 << 20


def indices(extent: int) -> st.SearchStrategy[Any]:
    ends = st.one_of(st.none(), st.integers(-extent - 2, extent + 2))
    steps = st.one_of(st.none(), st.integers(-4, 4).filter(bool))
    some = st.builds(slice, ends, ends, steps)
    return st.one_of(some, st.integers(-extent, extent - 1)) if extent else some


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), shapes(), st.booleans())
def test_any_part_is_what_numpy_takes_out_of_the_whole(data, shape, gap):
    array = data.draw(arrays(shape=st.just(shape)))
    store = MemoryStore()
    gpuckpt.save("", {"w": array}, store=store)
    index = [data.draw(indices(extent)) for extent in shape]
    first = data.draw(st.integers(0, len(index)))
    last = data.draw(st.integers(first, len(index)))
    asked: Any = (*index[:first], ..., *index[last:]) if gap else tuple(index[:first])

    with gpuckpt.open("", store=store) as file:
        found = file.get_slice("w")[asked]

    assert same(found, array[asked if gap else (*asked, ...)])


@pytest.mark.parametrize("index", [4, -5, (0, 0, 0), (..., 0, ...), None, [0, 1], True, 1.0, "a"])
def test_what_isnt_an_index_is_refused(index):
    store = MemoryStore()
    gpuckpt.save("", {"w": np.zeros((4, 3))}, store=store)
    with gpuckpt.open("", store=store) as file, pytest.raises(InvalidError, match="w: "):
        file.get_slice("w")[index]


def test_a_name_that_isnt_there_is_told(store):
    with gpuckpt.open("", store=store) as file:
        for ask in (file.get_tensor, file.get_slice):
            with pytest.raises(NotFoundError, match=r"model\.v"):
                ask("model.v")


def test_after_the_end_of_the_block_nothing_is_read(store):
    with gpuckpt.open("", store=store) as file:
        part = file.get_slice("model.w")
    file.close()
    with pytest.raises(ClosedError, match="open it again"):
        part[0]
    with pytest.raises(ClosedError, match="open it again"):
        file.get_tensor("model.w")
    assert "model.w" in file


def test_steps_files_and_checkpoints_are_opened(tmp_path):
    for step in (1, 2):
        saved = gpuckpt.save(tmp_path, {"w": np.full(3, step)}, step)
    (manifest,) = tmp_path.glob("*01.manifest.json")
    (segment,) = tmp_path.glob("step-*01.*.segment")

    places: list[tuple[Any, int | None]] = [(tmp_path, 1), (manifest, None), (segment, None)]
    for place, number in places:
        with gpuckpt.open(place, number) as file:
            assert file.get_tensor("w").tolist() == [1, 1, 1]
            assert file.step == 1
    for place in (tmp_path, saved, f"file://{tmp_path}"):
        with gpuckpt.open(place) as file:
            assert file.get_tensor("w").tolist() == [2, 2, 2]
    with pytest.raises(NotFoundError, match="step 3"):
        gpuckpt.open(tmp_path, 3)


def test_damage_is_found_when_it_is_read_and_only_then(tmp_path):
    gpuckpt.save(tmp_path, {"a": np.arange(999), "b": np.arange(999)}, codec="raw")
    (segment,) = tmp_path.glob("*.segment")
    data = bytearray(segment.read_bytes())
    data[100] ^= 1
    segment.write_bytes(data)

    with gpuckpt.open(tmp_path) as file:
        assert same(file.get_tensor("b"), np.arange(999))
        for ask in (file.get_tensor, lambda name: file.get_slice(name)[900:]):
            with pytest.raises(CorruptError, match="a in "):
                ask("a")


def test_sealed_checkpoints_are_opened_with_their_key(tmp_path):
    gpuckpt.save(tmp_path, {"w": np.arange(3)}, key=b"k" * 32)
    with gpuckpt.open(tmp_path, key=b"k" * 32) as file:
        assert file.get_slice("w")[1:].tolist() == [1, 2]
    with pytest.raises(AuthenticationError):
        gpuckpt.open(tmp_path, key=b"l" * 32)


def test_what_ranks_hold_is_whole_and_each_ranks_own_is_asked_for_by_rank():
    store = MemoryStore()
    whole = np.arange(64 * 64).reshape(64, 64)

    def work(group: Group) -> None:
        at = 32 * group.rank
        shard = gpuckpt.Sharded(whole[:, at : at + 32].copy(), whole.shape, (0, at))
        own = gpuckpt.PerRank({"seed": np.array([group.rank])})
        with gpuckpt.Checkpointer("", store=store, group=group, group_timeout=20) as ckpt:
            ckpt.save(1, {"w": shard, "own": own}).result(20)

    run_ranks(2, work)
    for rank in (0, 1):
        with gpuckpt.open("", store=store, rank=rank) as file:
            assert same(file.get_tensor("w"), whole)
            assert same(file.get_slice("w")[3:60:5, 30:34], whole[3:60:5, 30:34])
            assert file.get_tensor("own.seed").tolist() == [rank]


@pytest.mark.parametrize("options", [{"like": "lists"}, {"like": "numpy", "device": "cuda"}])
def test_libraries_and_devices_that_dont_fit_are_refused(options, store):
    with pytest.raises(InvalidError, match="like is one of"):
        gpuckpt.open("", store=store, **options)


def test_tensors_come_as_torchs_too(store):
    torch = pytest.importorskip("torch", reason="torch isn't installed")
    with gpuckpt.open("", store=store, like="torch") as file:
        assert file.get_tensor("model.half").dtype == torch.bfloat16
        part = file.get_slice("model.half")[::-3, :2]
    expected = state()["model"]["half"][::-3, :2].view(np.int16).tolist()
    assert part.view(torch.int16).tolist() == expected


def test_every_index_of_a_small_tensor():
    store = MemoryStore()
    small = np.arange(6).reshape(2, 3)
    gpuckpt.save("", {"w": small}, store=store)
    ends = (None, 0, 1, -1, 5)
    with gpuckpt.open("", store=store) as file:
        part = file.get_slice("w")
        for low, high, step in itertools.product(ends, ends, (None, 2, -1)):
            assert same(part[:, low:high:step], small[:, low:high:step])
