"""What a torch training loop has besides its modules: every optimizer and every scheduler."""

from __future__ import annotations

import inspect
from collections import Counter
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

import gpuckpt
from gpuckpt.manifest import pack_manifest, unpack_manifest
from gpuckpt.stores.memory import MemoryStore

torch: Any = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import gpuckpt.torch as adapter  # noqa: E402 - only where there is a torch
from tests.frameworks.same import frozen  # noqa: E402

lr_scheduler = torch.optim.lr_scheduler
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

EVERY: dict[str, Any] = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and name != "Optimizer"
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in EVERY),
    *(("SGD", options) for options in ({"momentum": 0.9, "nesterov": True}, {"momentum": 0.9})),
    ("AdamW", {"amsgrad": True}),
    ("AdamW", {"fused": True}),
    ("AdamW", {"foreach": True}),
    ("AdamW", {"lr": "tensor"}),
    ("Adam", {"maximize": True, "differentiable": False, "foreach": False}),
    ("RMSprop", {"centered": True, "momentum": 0.5}),
    ("LBFGS", {"line_search_fn": "strong_wolfe", "history_size": 3}),
    ("Rprop", {"foreach": True}),
]
VARIANTS = [(name, options) for name, options in VARIANTS if name in EVERY]


class Sparse(nn.Module):
    """The only kind of model whose gradients SparseAdam takes."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 6, sparse=True)

    def forward(self, x):
        return self.table(x.abs().mul(5).long().clamp(max=19)).sum((1, 2))


class Loop:
    def __init__(self, name: str, options: dict[str, Any], seed: int) -> None:
        torch.manual_seed(seed)
        bias = name != "Muon"  # which takes matrices only
        self.model: Any = (
            Sparse()
            if name == "SparseAdam"
            else nn.Sequential(nn.Linear(8, 12, bias=bias), nn.Tanh(), nn.Linear(12, 4, bias=bias))
        )
        chosen: dict[str, Any] = {"lr": 1e-2, **options}
        if chosen["lr"] == "tensor":
            chosen["lr"] = torch.tensor(1e-2)
        self.optimizer = EVERY[name](self.model.parameters(), **chosen)
        self.step = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(self.step))

            def closure(x=x):
                self.optimizer.zero_grad()
                loss = self.model(x).square().mean()
                loss.backward()
                return loss

            self.optimizer.step(closure)
            self.step += 1

    @property
    def state(self) -> dict[str, Any]:
        return {
            "model": adapter.Model(self.model),
            "optimizer": adapter.Optimizer(self.optimizer),
        }


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_every_optimizer_goes_on_with_the_same_bits(name, options, tmp_path):
    whole = Loop(name, options, seed=0)
    whole.train(3)
    gpuckpt.save(tmp_path, whole.state, step=3)
    then = frozen(whole.state)
    whole.train(4)

    fresh, older = Loop(name, options, seed=1), Loop(name, options, seed=2)
    older.train(2)
    for other in (fresh, older):
        with gpuckpt.Checkpointer(tmp_path) as ckpt:
            other.step = ckpt.resume(other.state)
        assert frozen(other.state) == then
        other.train(4)
        assert frozen(other.state) == frozen(whole.state)


def test_a_learning_rate_that_is_a_tensor_stays_the_tensor_that_it_is(tmp_path):
    loop = Loop("AdamW", {"lr": "tensor"}, seed=0)
    loop.train(1)
    (group,) = loop.optimizer.param_groups
    rate = group["lr"]
    gpuckpt.save(tmp_path, loop.state)
    rate.fill_(7.0)
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.restore(loop.state)
    assert loop.optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(1e-2)


def test_what_an_optimizer_has_is_filled_where_it_is(tmp_path):
    loop = Loop("AdamW", {}, seed=0)
    loop.train(2)
    gpuckpt.save(tmp_path, loop.state)
    before = [one.data_ptr() for state in loop.optimizer.state.values() for one in state.values()]
    loop.train(2)
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.restore(loop.state)
    after = [one.data_ptr() for state in loop.optimizer.state.values() for one in state.values()]
    assert after == before


def moved_to_a_gpu(store: MemoryStore) -> None:
    """As if the tensors of its checkpoint had been a GPU's."""
    (name,) = [one for one in store.names() if one.endswith("manifest.json")]
    data = bytearray(store.size(name))
    store.read_into(name, 0, memoryview(data))
    manifest = unpack_manifest(bytes(data), name)
    entries = tuple(
        replace(one, spec=replace(one.spec, device="cuda:0")) for one in manifest.tensors
    )
    store.remove(name)
    with closing(store.create(name)) as file:
        file.append([pack_manifest(replace(manifest, tensors=entries))])


def test_what_a_gpu_had_comes_back_where_there_is_none():
    whole, store = Loop("AdamW", {}, seed=0), MemoryStore()
    whole.train(3)
    gpuckpt.save("", whole.state, store=store)
    moved_to_a_gpu(store)
    with pytest.raises(gpuckpt.NotFoundError):
        gpuckpt.load("", store=store)

    fresh = Loop("AdamW", {}, seed=1)
    with gpuckpt.Checkpointer("", store=store) as ckpt:
        ckpt.resume(fresh.state)
    assert frozen(fresh.state) == frozen(whole.state)


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 7, 7]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 8),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 7),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 3, mode="triangular2"),
    "CyclicLR, own function": lambda o: lr_scheduler.CyclicLR(
        o, 1e-3, 1e-2, 3, scale_fn=lambda x: 0.9**x, scale_mode="iterations"
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=20),
    "OneCycleLR, linear": lambda o: lr_scheduler.OneCycleLR(
        o, 1e-2, total_steps=20, anneal_strategy="linear", three_phase=True
    ),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.95),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(o, 9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=9),
}


def test_every_scheduler_of_torch_is_among_those_tested():
    known = {
        name
        for name, kind in vars(lr_scheduler).items()
        if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler)
    }
    assert known - {"LRScheduler", "_LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("lr", [0.1, "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on_where_it_was(name, lr, tmp_path):
    def made():
        rate = torch.tensor(0.1) if lr == "tensor" else lr
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], rate, momentum=0.9)
        return optimizer, SCHEDULERS[name](optimizer)

    def advance(one, first, last):
        (optimizer, scheduler), rates = one, []
        for step in range(first, last):
            optimizer.step()
            scheduler.step(*([1.0 + step % 3] if "Plateau" in name else []))
            rates.append(float(optimizer.param_groups[0]["lr"]))
        return rates

    def state_of(optimizer, scheduler):
        return {
            "optimizer": adapter.Optimizer(optimizer),
            "scheduler": adapter.Scheduler(scheduler),
        }

    whole, other = made(), made()
    advance(whole, 0, 5)
    gpuckpt.save(tmp_path, state_of(*whole))
    then = frozen(state_of(*whole))
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.resume(state_of(*other))
    assert frozen(state_of(*other)) == then
    rates = advance(whole, 5, 12)
    assert advance(other, 5, 12) == rates
    assert len(set(rates)) > 1 or name in ("ConstantLR", "StepLR")


def test_containers_of_a_scheduler_keep_their_types(tmp_path):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], 0.1)
    scheduler = lr_scheduler.MultiStepLR(optimizer, [2, 5, 5])
    gpuckpt.save(tmp_path, {"scheduler": adapter.Scheduler(scheduler)})
    other = lr_scheduler.MultiStepLR(optimizer, [1])
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.resume({"scheduler": adapter.Scheduler(other)})
    assert other.milestones == Counter({2: 1, 5: 2})
    assert isinstance(other.milestones, Counter)


def test_a_generator_goes_on_where_it_was(tmp_path):
    generator = torch.Generator().manual_seed(4)
    torch.rand(11, generator=generator)
    gpuckpt.save(tmp_path, {"g": adapter.Generator(generator)})
    expected = torch.rand(5, generator=generator)
    other = torch.Generator()
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.resume({"g": adapter.Generator(other)})
    assert torch.rand(5, generator=other).equal(expected)


def test_a_gradient_scaler_goes_on_where_it_was(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], 0.1)
    for _ in range(3):
        scaler.scale(weight.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    gpuckpt.save(tmp_path, {"scaler": scaler})
    other = torch.amp.GradScaler("cpu")
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.resume({"scaler": other})
    assert other.state_dict() == scaler.state_dict()
    assert other.get_scale() == 2.0**17
