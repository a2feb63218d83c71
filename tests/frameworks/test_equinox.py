"""Equinox: modules, whose activation functions are leaves too, with optax's states."""

from __future__ import annotations

import pytest

import gpuckpt
from gpuckpt.stores.memory import MemoryStore

jax = pytest.importorskip("jax", reason="jax isn't installed")
eqx = pytest.importorskip("equinox", reason="equinox isn't installed")
optax = pytest.importorskip("optax", reason="optax isn't installed")

import gpuckpt.jax  # noqa: E402 - only where there is one
from tests.frameworks.trees import assert_same  # noqa: E402

jnp = jax.numpy
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def start(seed: int = 0):
    model = eqx.nn.Sequential(
        [
            eqx.nn.MLP(3, 4, 8, 2, key=jax.random.key(seed)),
            eqx.nn.Lambda(jax.nn.gelu),
            eqx.nn.Dropout(0.25),
            eqx.nn.LayerNorm(4),
        ]
    )
    return {"model": model, "optimizer": OPTIMIZER.init(eqx.filter(model, eqx.is_array))}


@eqx.filter_jit
def train(state, key):
    def loss(model):
        x, drop = jax.random.normal(key, (5, 3)), jax.random.split(key, 5)
        return jnp.mean(jax.vmap(lambda one, k: model(one, key=k))(x, drop) ** 2)

    gradients = eqx.filter_grad(loss)(state["model"])
    params = eqx.filter(state["model"], eqx.is_array)
    updates, optimizer = OPTIMIZER.update(gradients, state["optimizer"], params)
    return {"model": eqx.apply_updates(state["model"], updates), "optimizer": optimizer}


def test_a_module_and_its_optimizer_go_on_bit_for_bit():
    store, state = MemoryStore(), start()
    with gpuckpt.jax.Checkpointer("", store=store) as ckpt:
        for step in range(3):
            state = train(state, jax.random.key(step))
        ckpt.save(3, state)
        step, found = ckpt.resume(start(seed=9))
    assert step == 3
    assert_same(found, state)
    for step in range(3, 6):
        found, state = (train(one, jax.random.key(step)) for one in (found, state))
    assert_same(found, state)


def test_a_module_is_restored_without_ever_being_made():
    """From shapes alone: nothing is initialised only to be overwritten."""
    store, state = MemoryStore(), start()
    with gpuckpt.jax.Checkpointer("", store=store) as ckpt:
        ckpt.save(1, state)
        found = ckpt.restore(eqx.filter_eval_shape(start))
    assert_same(found, state)


def test_a_module_of_another_size_is_refused_by_name():
    store = MemoryStore()
    with gpuckpt.jax.Checkpointer("", store=store) as ckpt:
        ckpt.save(1, eqx.nn.Linear(3, 4, key=jax.random.key(0)))
        with pytest.raises(gpuckpt.MismatchError, match=r"weight: float32\[5, 3\] here"):
            ckpt.restore(eqx.nn.Linear(3, 5, key=jax.random.key(0)))
