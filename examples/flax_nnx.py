"""Flax NNX: a module, its optimizer, batch statistics and dropout's random numbers, resumed."""

import argparse
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import gpuckpt
import gpuckpt.jax


class Classifier(nnx.Module):
    """Says whether points lie in a ring."""

    def __init__(self, rngs):
        self.first = nnx.Linear(2, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.last = nnx.Linear(32, 2, rngs=rngs)

    def __call__(self, x):  # noqa: D102
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


@nnx.jit
def train(model, optimizer, x, labels):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def batch(step):
    """Points inside and outside of a ring."""
    x = jax.random.normal(jax.random.key(step), (64, 2))
    radius = jnp.linalg.norm(x, axis=1)
    return x, ((radius > 0.7) & (radius < 1.5)).astype(int)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    model.train()

    def state():
        return {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}

    with gpuckpt.jax.Checkpointer(options.root, every=gpuckpt.Every(steps=5)) as ckpt:
        done, restored = ckpt.resume(state())
        nnx.update(model, restored["model"])
        nnx.update(optimizer, restored["optimizer"])
        for step in range(done + 1, options.steps + 1):
            train(model, optimizer, *batch(step))
            ckpt.step(step, state())
            print(f"step {step}", flush=True)

    found = hashlib.sha256()
    for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)):
        found.update(np.asarray(leaf).tobytes())
    print("digest", found.hexdigest())


if __name__ == "__main__":
    main()
