"""Equinox: a recurrent module, whose functions aren't saved, restored without being initialised."""

import argparse
import hashlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import gpuckpt
import gpuckpt.jax

OPTIMIZER = optax.adam(3e-3)


class Echo(eqx.Module):
    """Says what it heard three steps ago."""

    cell: eqx.nn.GRUCell
    last: eqx.nn.MLP

    def __init__(self, key):
        one, other = jax.random.split(key)
        self.cell = eqx.nn.GRUCell(1, 24, key=one)
        self.last = eqx.nn.MLP(24, 1, 16, 1, activation=jax.nn.gelu, key=other)

    def __call__(self, sequence):  # noqa: D102
        def step(hidden, x):
            hidden = self.cell(x, hidden)
            return hidden, self.last(hidden)

        return jax.lax.scan(step, jnp.zeros(24), sequence)[1]


def start():
    model = Echo(jax.random.key(0))
    optimizer = OPTIMIZER.init(eqx.filter(model, eqx.is_array))
    return {"model": model, "optimizer": optimizer, "key": jax.random.key(1)}


@eqx.filter_jit(donate="all")
def train(state):
    key, sub = jax.random.split(state["key"])
    heard = jax.random.normal(sub, (32, 20, 1))

    def loss(model):
        return jnp.mean((jax.vmap(model)(heard)[:, 3:] - heard[:, :-3]) ** 2)

    gradients = eqx.filter_grad(loss)(state["model"])
    updates, optimizer = OPTIMIZER.update(gradients, state["optimizer"])
    model = eqx.apply_updates(state["model"], updates)
    return {"model": model, "optimizer": optimizer, "key": key}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    with gpuckpt.jax.Checkpointer(options.root, every=gpuckpt.Every(steps=5)) as ckpt:
        begun = ckpt.latest() is not None
        done, state = ckpt.resume(eqx.filter_eval_shape(start) if begun else start())
        for step in range(done + 1, options.steps + 1):
            state = train(state)
            ckpt.step(step, state)
            print(f"step {step}", flush=True)

    found = hashlib.sha256()
    for leaf in jax.tree.leaves(eqx.filter(state["model"], eqx.is_array)):
        found.update(np.asarray(leaf).tobytes())
    print("digest", found.hexdigest())


if __name__ == "__main__":
    main()
