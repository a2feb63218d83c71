"""Plain JAX and optax: a functional loop whose step donates its state, resumed bit for bit."""

import argparse
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gpuckpt
import gpuckpt.jax

SIZES = (2, 64, 64, 1)
OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(3e-3, 500))
)


def start(seed):
    """Everything that the loop goes on from: parameters, optimizer, random numbers."""
    key, *keys = jax.random.split(jax.random.key(seed), len(SIZES))
    params = [
        {"w": jax.random.normal(k, (n, m)) / jnp.sqrt(n), "b": jnp.zeros(m)}
        for k, n, m in zip(keys, SIZES, SIZES[1:], strict=False)
    ]
    return {"params": params, "optimizer": OPTIMIZER.init(params), "key": key}


def predict(params, x):
    for layer in params[:-1]:
        x = jax.nn.gelu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


@functools.partial(jax.jit, donate_argnums=0)
def train(state):
    """One step on a batch that is drawn in it: a surface with a few waves."""
    key, sub = jax.random.split(state["key"])
    x = jax.random.uniform(sub, (128, 2), minval=-2, maxval=2)
    y = jnp.sin(3 * x[:, :1]) * jnp.cos(2 * x[:, 1:])
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((predict(p, x) - y) ** 2))(state["params"])
    updates, optimizer = OPTIMIZER.update(grads, state["optimizer"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "optimizer": optimizer, "key": key}, loss


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    state = start(seed=0)
    with gpuckpt.jax.Checkpointer(
        options.root, every=gpuckpt.Every(steps=5), keep=gpuckpt.Keep(last=2)
    ) as ckpt:
        done, state = ckpt.resume(state)
        for step in range(done + 1, options.steps + 1):
            state, loss = train(state)
            ckpt.step(step, state, metrics={"loss": float(loss)})
            print(f"step {step}", flush=True)

    found = hashlib.sha256()
    for leaf in jax.tree.leaves(state["params"]):
        found.update(np.asarray(leaf).tobytes())
    print("digest", found.hexdigest())


if __name__ == "__main__":
    main()
