"""Flax: NNX modules and states, Linen's parameters, TrainState, with optax's states."""

from __future__ import annotations

from typing import Any

import pytest

import gpuckpt
from gpuckpt.stores.memory import MemoryStore

jax = pytest.importorskip("jax", reason="jax isn't installed")
flax = pytest.importorskip("flax", reason="flax isn't installed")
optax = pytest.importorskip("optax", reason="optax isn't installed")

import flax.linen as nn  # noqa: E402 - only where there is one
from flax import nnx  # noqa: E402
from flax.core import FrozenDict, freeze  # noqa: E402
from flax.training.train_state import TrainState  # noqa: E402

import gpuckpt.jax  # noqa: E402
from tests.frameworks.trees import assert_same  # noqa: E402

jnp = jax.numpy


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(2)(nn.BatchNorm(use_running_average=True)(nn.relu(nn.Dense(8)(x))))


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.last = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


@nnx.jit
def train(model: Nnx, optimizer: nnx.Optimizer[Any], x: Any) -> None:
    gradients = nnx.grad(lambda one: jnp.mean(one(x) ** 2))(model)
    optimizer.update(model, gradients)


def nnx_start(seed: int) -> tuple[Nnx, Any]:
    model = Nnx(nnx.Rngs(seed))
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


def batch(step: int) -> Any:
    return jax.random.normal(jax.random.key(step), (5, 3))


def linen_start(seed: int) -> TrainState:
    variables = Linen().init(jax.random.key(seed), batch(0))
    return TrainState.create(apply_fn=Linen().apply, params=variables, tx=optax.adam(1e-2))


def saved(tree: Any) -> MemoryStore:
    store = MemoryStore()
    with gpuckpt.jax.Checkpointer("", store=store) as ckpt:
        ckpt.save(1, tree)
    return store


def test_an_nnx_modules_state_goes_on_bit_for_bit():
    """Parameters, batch statistics, and the streams of random numbers for dropout."""
    model, optimizer = nnx_start(0)
    for step in range(3):
        train(model, optimizer, batch(step))
    store = saved({"model": nnx.state(model), "optimizer": nnx.state(optimizer)})

    other, its_optimizer = nnx_start(9)
    target = {"model": nnx.state(other), "optimizer": nnx.state(its_optimizer)}
    found = gpuckpt.jax.load("", target, store=store)
    nnx.update(other, found["model"])
    nnx.update(its_optimizer, found["optimizer"])
    assert_same(nnx.state(other), nnx.state(model))
    for step in range(3, 6):
        train(model, optimizer, batch(step))
        train(other, its_optimizer, batch(step))
    assert_same(nnx.state(other), nnx.state(model))
    assert_same(nnx.state(its_optimizer), nnx.state(optimizer))


def test_an_nnx_module_is_a_tree_itself():
    model, other = Nnx(nnx.Rngs(0)), Nnx(nnx.Rngs(9))
    found = gpuckpt.jax.load("", other, store=saved(model))
    assert isinstance(found, Nnx)
    assert_same(nnx.state(found), nnx.state(model))


def test_an_nnx_module_is_restored_without_ever_being_made():
    model = Nnx(nnx.Rngs(0))
    shapes = nnx.state(nnx.eval_shape(lambda: Nnx(nnx.Rngs(9))))
    assert_same(gpuckpt.jax.load("", shapes, store=saved(nnx.state(model))), nnx.state(model))


def test_a_train_state_goes_on_bit_for_bit():
    def one_step(state: TrainState, x: Any) -> TrainState:
        gradients = jax.grad(lambda p: jnp.mean(state.apply_fn(p, x) ** 2))(state.params)
        return state.apply_gradients(grads=gradients)

    step_fn = jax.jit(one_step, donate_argnums=0)
    state, store = linen_start(0), MemoryStore()
    with gpuckpt.jax.Checkpointer("", store=store) as ckpt:
        for step in range(3):
            state = step_fn(state, batch(step))
        ckpt.save(3, state)
        _, found = ckpt.resume(linen_start(9))
    assert int(found.step) == 3
    found = found.replace(apply_fn=state.apply_fn, tx=state.tx)
    for step in range(3, 6):
        found, state = step_fn(found, batch(step)), step_fn(state, batch(step))
    assert_same(found, state)


def test_frozen_and_plain_dicts_have_the_same_names():
    variables = Linen().init(jax.random.key(0), batch(0))
    store = saved(freeze(variables))
    found = gpuckpt.jax.load("", freeze(variables), store=store)
    assert isinstance(found, FrozenDict)
    assert_same(found, freeze(variables))
    assert_same(gpuckpt.jax.load("", variables, store=store), variables)
