"""Modules of every kind: what they hold comes back in place, whatever they are wrapped in."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import gpuckpt

torch: Any = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import gpuckpt.torch as adapter  # noqa: E402 - only where there is a torch
from tests.frameworks.same import bits, frozen  # noqa: E402


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.out = nn.Linear(8, 12, bias=False)
        self.out.weight = self.embedding.weight


class Extra(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.seen = {"words": ["a", "b"], "count": 3}

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state


class Versioned(nn.Module):
    """As some modules do, it takes what has no version for something very old."""

    _version = 3

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        assert local_metadata.get("version") == 3
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def images():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model(torch.randn(4, 3, 9, 9))
    return model.to(memory_format=torch.channels_last)


def averaged():
    model = nn.Linear(4, 4)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    for _ in range(2):
        average.update_parameters(model)
    return average


def frozen_half():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


MODELS = {
    "transformer": lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
    "images, channels last": images,
    "recurrent": lambda: nn.LSTM(5, 7, 2),
    "tied": Tied,
    "weights that are computed": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)),
    "state of its own": Extra,
    "versioned": Versioned,
    "average": averaged,
    "bfloat16": lambda: nn.Linear(9, 5).bfloat16(),
    "complex": lambda: nn.Linear(3, 3, dtype=torch.complex64),
    "half of it frozen": frozen_half,
    "lists": lambda: nn.ModuleDict({"a.b".replace(".", "_"): nn.ModuleList([nn.Linear(2, 2)])}),
    "nothing": nn.ReLU,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_module_comes_back_in_place(name, tmp_path):
    torch.manual_seed(0)
    saved = MODELS[name]()
    gpuckpt.save(tmp_path, {"model": adapter.Model(saved)})
    torch.manual_seed(1)
    fresh = MODELS[name]()
    before = {key: one.data_ptr() for key, one in tensors(fresh).items()}
    needed = [one.requires_grad for one in fresh.parameters()]
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.resume({"model": adapter.Model(fresh)})
    assert frozen(fresh) == frozen(saved)
    assert {key: one.data_ptr() for key, one in tensors(fresh).items()} == before
    assert [one.requires_grad for one in fresh.parameters()] == needed


def tensors(module):
    return {k: v for k, v in module.state_dict().items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "versioned"])
def test_a_model_and_a_bare_module_have_the_same_checkpoint(name, tmp_path):
    model = MODELS[name]()
    gpuckpt.save(tmp_path / "a", {"model": adapter.Model(model)})
    other = MODELS[name]()
    with gpuckpt.Checkpointer(tmp_path / "a") as ckpt:
        ckpt.resume({"model": other})
    assert frozen(other) == frozen(model)


def compiled(module):
    return torch.compile(module, backend="eager")


def partly(module):
    module[0] = compiled(module[0])
    return module


def twice(module):
    return compiled(nn.DataParallel(partly(module)))


WRAPPED = {"plain": lambda m: m, "compiled": compiled, "partly": partly, "twice": twice}


def small(seed):
    torch.manual_seed(seed)
    # One of a name that wrappers use, too.
    inner = nn.Sequential()
    inner.add_module("module", nn.Linear(3, 3))
    return nn.Sequential(inner, nn.BatchNorm1d(3))


@pytest.mark.parametrize("before", WRAPPED)
@pytest.mark.parametrize("after", WRAPPED)
def test_names_are_the_same_compiled_wrapped_or_neither(before, after, tmp_path):
    saved = small(0)
    gpuckpt.save(tmp_path, {"model": adapter.Model(WRAPPED[before](saved))})
    names = set(gpuckpt.load(tmp_path)["model"])
    assert names == {
        *("0.module.weight", "0.module.bias", "1.weight", "1.bias"),
        *("1.running_mean", "1.running_var", "1.num_batches_tracked"),
    }
    fresh = WRAPPED[after](small(1))
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.resume({"model": adapter.Model(fresh)})
    assert list(frozen(fresh).values()) == list(frozen(saved).values())


def test_an_average_of_a_compiled_model_has_plain_names():
    average = torch.optim.swa_utils.AveragedModel(compiled(nn.Linear(2, 2)))
    assert set(adapter.Model(average).state_dict()) == {
        *("n_averaged", "module.weight", "module.bias"),
    }


def test_a_model_of_other_names_is_refused_by_name(tmp_path):
    gpuckpt.save(tmp_path, {"model": adapter.Model(nn.Linear(2, 2))})
    with (
        gpuckpt.Checkpointer(tmp_path) as ckpt,
        pytest.raises(gpuckpt.MismatchError, match=r'Unexpected key.*"bias"'),
    ):
        ckpt.resume({"model": adapter.Model(nn.Linear(2, 2, bias=False))})


def test_a_model_of_other_shapes_is_refused_before_anything_changes(tmp_path):
    gpuckpt.save(tmp_path, {"model": adapter.Model(nn.Linear(2, 2))})
    other = nn.Linear(2, 3)
    before = frozen(other)
    with (
        gpuckpt.Checkpointer(tmp_path) as ckpt,
        pytest.raises(gpuckpt.MismatchError, match=r"float32\[3, 2\] here, float32\[2, 2\] in"),
    ):
        ckpt.resume({"model": adapter.Model(other)})
    assert frozen(other) == before


def test_what_is_no_module_is_no_model():
    with pytest.raises(gpuckpt.InvalidError, match=r"torch.nn.Module; got a builtins.dict"):
        adapter.Model({"weight": torch.ones(3)})


def test_views_and_shared_storages_are_filled_where_they_are(tmp_path):
    flat = torch.randn(40)
    state = {"a": flat[:16].view(4, 4), "b": flat[16:], "both": flat[8:24], "every": flat[::2]}
    gpuckpt.save(tmp_path, state)
    before = flat.clone()
    flat.zero_()
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.resume(state)
    assert flat.equal(before)


def test_views_that_had_other_bytes_each_are_refused_and_not_mixed(tmp_path):
    gpuckpt.save(tmp_path, {"a": torch.zeros(8), "b": torch.ones(8)})
    flat = torch.zeros(12)
    with (
        gpuckpt.Checkpointer(tmp_path) as ckpt,
        pytest.raises(gpuckpt.MismatchError, match="shares memory with another array"),
    ):
        ckpt.resume({"a": flat[:8], "b": flat[4:]})


REFUSED = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "its indices and values"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "torch.sparse_csr; save its .to_dense()"),
    "meta": (lambda: torch.empty(3, device="meta"), r"\.to_empty\(device=…\)"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        r"\.int_repr\(\)",
    ),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2)]), r"\.unbind\(\)"),
    "conjugated": (lambda: torch.ones(2, dtype=torch.complex64).conj(), r"resolve_conj\(\)"),
    "negated": (lambda: torch._neg_view(torch.ones(2)), r"resolve_neg\(\)"),
    "complex32": (lambda: torch.zeros(2, dtype=torch.complex32), "view_as_real"),
    "int4": (lambda: torch.zeros(2, dtype=torch.uint8).view(torch.int4), r"\.view\(torch.uint8\)"),
    "bits8": (lambda: torch.zeros(2, dtype=torch.uint8).view(torch.bits8), "isn't known outside"),
    "dtype": (lambda: torch.float32, "a torch.dtype can't be saved"),
    "generator": (torch.Generator, "Generator can't be saved"),
    "lazy": (lambda: nn.LazyLinear(3).weight, "run the module once"),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_saved_is_named_and_says_what_to_do(kind, tmp_path):
    make, reason = REFUSED[kind]
    with pytest.raises(gpuckpt.UnsupportedError, match=reason) as raised:
        gpuckpt.save(tmp_path / "a", {"model": {"layer": [make()]}})
    assert raised.value.name == "model.layer.0"
    assert not list((tmp_path / "a").glob("*.manifest.json"))


def test_a_fake_tensor_is_refused(tmp_path):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = torch.empty(3)
    with pytest.raises(gpuckpt.UnsupportedError, match="a fake tensor"):
        gpuckpt.save(tmp_path, {"w": fake})


def test_a_copy_of_a_model_is_a_state_of_its_own(tmp_path):
    model = Tied()
    other = copy.deepcopy(model)
    gpuckpt.save(tmp_path, {"one": adapter.Model(model), "other": adapter.Model(other)})
    found = gpuckpt.load(tmp_path)
    assert found["one"]["out.weight"] is found["one"]["embedding.weight"]
    assert found["one"]["out.weight"] is not found["other"]["out.weight"]
    assert bits(found["one"]["out.weight"]) == bits(model.out.weight)
