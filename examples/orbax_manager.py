"""A loop that was written for Orbax; only its import is another."""

import argparse
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gpuckpt.adapters.orbax as ocp  # was: import orbax.checkpoint as ocp

OPTIMIZER = optax.sgd(0.05, momentum=0.9)


def start():
    params = {"w": jnp.zeros((8, 3)), "b": jnp.zeros(3)}
    return {"params": params, "optimizer": OPTIMIZER.init(params)}


def batch(step):
    x = jax.random.normal(jax.random.key(step), (64, 8))
    return x, jnp.argmax(x[:, :3] + 0.5 * x[:, 3:6], axis=1)


@jax.jit
def train(state, x, labels):
    def loss(params):
        logits = x @ params["w"] + params["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, gradients = jax.value_and_grad(loss)(state["params"])
    updates, optimizer = OPTIMIZER.update(gradients, state["optimizer"])
    return {
        "params": optax.apply_updates(state["params"], updates),
        "optimizer": optimizer,
    }, value


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    manager_options = ocp.CheckpointManagerOptions(
        save_interval_steps=5,
        max_to_keep=2,
        best_fn=lambda metrics: metrics["loss"],
        best_mode="min",
    )
    with ocp.CheckpointManager(options.root, options=manager_options) as manager:
        state, done = start(), manager.latest_step() or 0
        if done:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            restored = manager.restore(
                done,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
                ),
            )
            state = restored.state
            assert restored.meta["step"] == done
        for step in range(done + 1, options.steps + 1):
            state, loss = train(state, *batch(step))
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave({"step": step})
            )
            manager.save(step, args=items, metrics={"loss": float(loss)})
            print(f"step {step}", flush=True)

    found = hashlib.sha256()
    for leaf in jax.tree.leaves(state["params"]):
        found.update(np.asarray(leaf).tobytes())
    print("digest", found.hexdigest())


if __name__ == "__main__":
    main()
