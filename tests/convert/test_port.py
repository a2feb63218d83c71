"""What all formats share: outlines, parts of tensors, digests, and which format a path is of."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.boxes import Box
from gpuckpt.conversion.feed import Digest, Feed
from gpuckpt.conversion.formats import FORMATS, source_format, target_format
from gpuckpt.conversion.port import PART_NBYTES, parts_of, read_whole
from gpuckpt.conversion.slabs import slabs
from gpuckpt.conversion.states import StateSource
from gpuckpt.errors import CorruptError, InvalidError, NotFoundError
from gpuckpt.fingerprint import fingerprint
from tests.convert.states import state_of, training_state
from tests.strategies import same, shapes, states


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(states())
def test_a_state_comes_back_from_a_source_that_was_made_of_it(state):
    assert same(state_of(StateSource(state)), state)


@settings(deadline=None)
@given(shapes(), st.integers(1, 16), st.integers(1, 200))
def test_slabs_follow_each_other_in_c_order_and_are_the_whole_tensor(shape, item, most):
    order = np.arange(math.prod(shape)).reshape(shape)
    found = list(slabs(shape, item, most))

    taken = [order[box.slices].reshape(-1) for box in found]

    assert np.concatenate([*taken, np.empty(0, int)]).tolist() == list(range(order.size))
    assert all(box.count * item <= max(most, item) for box in found)


def test_slabs_are_as_large_as_they_may_be():
    assert [box.shape for box in slabs((4, 4), 1, 4)] == [(1, 4)] * 4
    assert [box.shape for box in slabs((5, 4), 1, 8)] == [(2, 4), (2, 4), (1, 4)]
    assert [box.shape for box in slabs((2, 4), 1, 3)] == [(1, 3), (1, 1)] * 2


def test_a_tensor_of_no_axes_is_one_slab():
    assert list(slabs((), 8, 4)) == [Box((), ())]


@settings(deadline=None)
@given(st.integers(0, 300_000), st.lists(st.integers(1, 150_000), max_size=8))
def test_a_digest_of_parts_is_the_fingerprint_of_the_whole(nbytes, cuts):
    raw = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
    digest = Digest()
    for cut in cuts:
        digest.update(raw[:cut].data)
        raw = raw[cut:]
    digest.update(raw.data)

    whole = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)

    assert digest.nbytes == nbytes
    assert digest.fingerprint() == fingerprint(whole.data)


@pytest.mark.parametrize("item", [1, 2, 12, 16, 2 * PART_NBYTES])
@pytest.mark.parametrize("count", [0, 1, 700_000, 3_000_000])
def test_parts_are_whole_elements_and_as_long_as_allowed(count, item):
    raw = np.zeros(min(count * item, 4 * PART_NBYTES) // item * item, np.uint8)

    parts = [part.nbytes for part in parts_of(raw, item)]

    assert sum(parts) == raw.nbytes
    assert all(nbytes % item == 0 and 0 < nbytes <= max(PART_NBYTES, item) for nbytes in parts)


def test_what_is_picked_by_name_is_a_flat_dict_of_arrays_and_values_tied_ones_too():
    state = training_state()
    feed = Feed(StateSource(state), ["model.tied", "model.w", "optimizer.3.*"])

    found = state_of(feed)

    assert list(found) == ["model.w", "model.tied", "optimizer.3.0", "optimizer.3.1.0"] + [
        f"optimizer.3.1.{at}" for at in (1, 2, 3)
    ]
    assert found["model.w"] is found["model.tied"]
    assert same(found["optimizer.3.0"], state["optimizer"][3][0])
    assert found["optimizer.3.1.2"] == 0.1


def test_any_text_that_a_state_may_have_as_a_key_may_be_picked():
    state = {"\ud800": np.zeros(1), "": {"\0": np.ones(2)}}
    found = state_of(Feed(StateSource(state), ["*"]))
    assert same(found, {"\ud800": np.zeros(1), ".\0": np.ones(2)})


def test_a_name_that_picks_nothing_is_told_with_what_is_near():
    with pytest.raises(NotFoundError, match=r"model\.half"):
        Feed(StateSource(training_state()), ["model.halv"])


def test_a_source_that_gives_too_little_or_too_much_is_found_out():
    class Lying(StateSource):
        def read(self, position):
            yield from super().read(position)
            yield memoryview(b"more")

    class Short(StateSource):
        def read(self, position):
            yield memoryview(b"")

    state = {"w": np.zeros(4)}
    for source in (Lying(state), Short(state)):
        with pytest.raises(CorruptError, match="w: "):
            list(Feed(source).read(0))
    with pytest.raises(CorruptError, match="0 bytes came, 32"):
        read_whole(Short(state), 0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.safetensors", "safetensors"),
        ("a.npz", "npz"),
        *((f"a{suffix}", "torch") for suffix in (".pt", ".pth", ".ckpt", ".bin")),
        ("run", "gpuckpt"),
        ("s3://bucket/run", "gpuckpt"),
    ],
)
def test_a_targets_name_tells_its_format(name, expected):
    assert target_format(name).name == expected


def test_a_target_whose_name_tells_nothing_needs_a_format():
    with pytest.raises(InvalidError, match="--to"):
        target_format("model.onnx")
    with pytest.raises(InvalidError, match="one of safetensors"):
        target_format("model", "onnx")
    assert target_format("model", "safetensors").name == "safetensors"


def test_each_format_has_a_name_of_its_own():
    assert len({one.name for one in FORMATS}) == len(FORMATS)


def test_what_is_there_tells_a_sources_format(tmp_path):
    gpuckpt.save(tmp_path / "run", {"w": np.zeros(3)})
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.bin").write_bytes(b"not torch's")

    assert source_format(str(tmp_path / "run")).name == "gpuckpt"
    for segment in (tmp_path / "run").glob("*.segment"):
        assert source_format(str(segment)).name == "gpuckpt"
    for name in ("empty", "a.bin", "missing"):
        with pytest.raises(InvalidError, match="nothing of a format"):
            source_format(str(tmp_path / name))
