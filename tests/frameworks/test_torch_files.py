"""`gpuckpt.torch.save` and `load`, in the place of torch.save and torch.load of state dicts."""

from __future__ import annotations

import io
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpuckpt

torch: Any = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import gpuckpt.torch as adapter  # noqa: E402 - only where there is a torch
from tests.frameworks.same import bits, frozen  # noqa: E402

DTYPES = [
    *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
]
SHAPES = st.lists(st.integers(0, 5), max_size=4)


@st.composite
def tensors(draw):
    """Any bytes of any type, whole, transposed, or every other element."""
    dtype = getattr(torch, draw(st.sampled_from(DTYPES)))
    shape = draw(SHAPES)
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype is torch.bool else 256
    drawn = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    raw = torch.randint(0, high, (count,), dtype=torch.uint8, generator=drawn)
    tensor = raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
    order = draw(st.permutations(range(len(shape))))
    tensor = tensor.permute(order)
    return tensor[::2] if tensor.ndim and draw(st.booleans()) else tensor


VALUES = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
    st.binary(max_size=5),
)
STATES = st.dictionaries(
    st.one_of(st.text(max_size=4), st.integers(0, 9)),
    st.recursive(
        st.one_of(tensors(), VALUES),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=6,
    ),
    max_size=5,
)


def dense(state):
    """A state without what strides its tensors have."""
    if isinstance(state, dict):
        return {key: dense(value) for key, value in state.items()}
    if isinstance(state, list):
        return [dense(value) for value in state]
    if isinstance(state, torch.Tensor):
        return (state.dtype, tuple(state.shape), bits(state))
    return state


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(state=STATES)
def test_what_is_loaded_is_what_was_saved(tmp_path_factory, state):
    place = tmp_path_factory.mktemp("file")
    adapter.save(state, place)
    found = adapter.load(place)
    assert list(found) == list(state)
    assert dense(found) == dense(state)


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def test_a_state_dict_goes_into_a_model_as_from_torch_load(tmp_path):
    saved, fresh = model(0), model(1)
    adapter.save(saved.state_dict(), tmp_path / "model")
    found = adapter.load(tmp_path / "model", weights_only=True, mmap=True, map_location="cpu")
    torch.save(saved.state_dict(), tmp_path / "model.pt")
    assert frozen(found) == frozen(torch.load(tmp_path / "model.pt"))
    fresh.load_state_dict(found)
    assert frozen(fresh) == frozen(saved)


def test_a_module_and_an_optimizer_are_saved_by_their_state_dicts(tmp_path):
    one = model()
    optimizer = torch.optim.AdamW(one.parameters())
    one(torch.ones(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    adapter.save({"model": one, "optimizer": optimizer, "epoch": 3}, tmp_path / "a")
    found = adapter.load(tmp_path / "a")
    assert found["epoch"] == 3
    optimizer.load_state_dict(found["optimizer"])
    assert frozen(optimizer.state_dict()["state"]) == frozen(found["optimizer"]["state"])


def test_tied_tensors_and_memory_formats_come_back(tmp_path):
    weight = nn.Parameter(torch.randn(2, 3, 4, 5))
    last = weight.detach().contiguous(memory_format=torch.channels_last)
    adapter.save({"a": weight, "b": weight, "c": weight.detach(), "d": last}, tmp_path / "a")
    found = adapter.load(tmp_path / "a")
    assert found["a"] is found["b"]
    assert found["a"] is found["c"]
    assert not found["a"].requires_grad
    assert found["d"].is_contiguous(memory_format=torch.channels_last)
    found["a"][0] = 0  # it owns memory that may be written to
    assert found["b"][0].count_nonzero() == 0


def test_a_save_over_another_replaces_it(tmp_path):
    for step in range(3):
        adapter.save({"w": torch.full((4,), float(step))}, tmp_path / "a")
    assert adapter.load(tmp_path / "a")["w"].tolist() == [2.0] * 4
    assert len(list((tmp_path / "a").glob("*.manifest.json"))) == 1


def test_a_url_is_a_url_and_no_directory_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = (tmp_path / "a").as_uri()
    adapter.save({"w": torch.ones(4)}, url)
    assert [one.name for one in tmp_path.iterdir()] == ["a"]
    assert adapter.load(url)["w"].tolist() == [1.0] * 4
    gpuckpt.save(url, {"w": torch.ones(4)}, 5)
    with pytest.raises(gpuckpt.InvalidError, match="a training run"):
        adapter.save({"w": torch.ones(4)}, url)
    (tmp_path / "file").touch()
    for call in (lambda place: adapter.save({}, place), adapter.load):
        with pytest.raises(gpuckpt.InvalidError, match="is a file"):
            call((tmp_path / "file").as_uri())


def test_a_save_that_fails_leaves_what_was_there(tmp_path):
    adapter.save({"w": torch.ones(4)}, tmp_path / "a")
    with pytest.raises(gpuckpt.UnsupportedError, match=r"w: .*meta device"):
        adapter.save({"w": torch.ones(4, device="meta")}, tmp_path / "a")
    assert adapter.load(tmp_path / "a")["w"].tolist() == [1.0] * 4


def test_a_sealed_one_is_loaded_by_its_key_alone(tmp_path):
    adapter.save({"w": torch.ones(4)}, tmp_path / "a", key=b"k" * 32)
    assert adapter.load(tmp_path / "a", key=b"k" * 32)["w"].tolist() == [1.0] * 4
    with pytest.raises(gpuckpt.AuthenticationError):
        adapter.load(tmp_path / "a", key=b"x" * 32)


@pytest.mark.parametrize("location", ["cpu", torch.device("cpu"), {"cuda:0": "cpu"}, None])
def test_a_map_location_is_a_device_or_a_dict_of_them(tmp_path, location):
    adapter.save({"w": [torch.ones(4)] * 2}, tmp_path / "a")
    found = adapter.load(tmp_path / "a", map_location=location)["w"]
    assert found[0].device.type == "cpu"
    assert found[0] is found[1]


def test_a_dict_of_devices_moves_those_it_names_and_keeps_what_is_one_tensor(tmp_path):
    adapter.save({"w": [torch.ones(4)] * 2, "n": 1}, tmp_path / "a")
    found = adapter.load(tmp_path / "a", map_location={"cpu": "meta"})
    assert found["w"][0].device.type == "meta"
    assert found["w"][0] is found["w"][1]


def test_what_is_not_possible_says_so(tmp_path):
    state, file = {"w": torch.ones(2)}, cast("Any", io.BytesIO())
    adapter.save(state, tmp_path / "a")
    with pytest.raises(gpuckpt.InvalidError, match="map_location can't be a function"):
        adapter.load(tmp_path / "a", map_location=lambda storage, _: storage)
    with pytest.raises(gpuckpt.InvalidError, match="a BytesIO isn't the path of one"):
        adapter.save(state, file)
    with pytest.raises(gpuckpt.InvalidError, match="a BytesIO isn't the path of one"):
        adapter.load(file)
    with pytest.raises(gpuckpt.NotFoundError):
        adapter.load(tmp_path / "nothing")
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(gpuckpt.InvalidError, match=r"torch.save wrote it"):
        adapter.load(tmp_path / "model.pt")
    with pytest.raises(gpuckpt.InvalidError, match="is a file; a checkpoint is a directory"):
        adapter.save(state, tmp_path / "model.pt")


def test_the_root_of_a_run_is_not_overwritten_but_can_be_loaded(tmp_path):
    gpuckpt.save(tmp_path, {"w": torch.ones(2)}, step=7)
    with pytest.raises(gpuckpt.InvalidError, match="has the checkpoints of a training run"):
        adapter.save({"w": torch.zeros(2)}, tmp_path)
    assert adapter.load(tmp_path)["w"].tolist() == [1.0, 1.0]
