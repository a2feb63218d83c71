"""CuPy: a loop that changes its arrays in place, on the GPU, beside its saves."""

import argparse
import hashlib

import cupy as cp
import numpy as np

import gpuckpt

FEATURES, BATCH = 256, 64
TRUTH = np.random.default_rng(1).standard_normal(FEATURES).astype(np.float32)


def start():
    np.random.seed(0)  # noqa: NPY002 - the generator that gpuckpt.RNG saves
    return {
        "weights": cp.zeros(FEATURES, cp.float32),
        "momentum": cp.zeros(FEATURES, cp.float32),
        "random": gpuckpt.RNG(),
    }


def train(state):
    """One step of logistic regression with momentum; every change is made in place."""
    drawn = np.random.standard_normal((BATCH, FEATURES))  # noqa: NPY002
    x, truth = cp.asarray(drawn.astype(np.float32)), cp.asarray(TRUTH)
    labels = ((x * truth).sum(axis=1) > 0).astype(cp.float32)
    guess = 1 / (1 + cp.exp(-(x * state["weights"]).sum(axis=1)))
    state["momentum"] *= 0.9
    state["momentum"] += (x * (guess - labels)[:, None]).sum(axis=0) / BATCH
    state["weights"] -= 0.1 * state["momentum"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    state = start()
    with gpuckpt.Checkpointer(options.root, every=gpuckpt.Every(steps=5)) as ckpt:
        done = ckpt.resume(state)
        for step in range(done + 1, options.steps + 1):
            with ckpt.update():  # on the GPU, after the copy of the save before; nothing waits
                train(state)
            ckpt.step(step, state)
            print(f"step {step}", flush=True)

    found = hashlib.sha256()
    for name in ("momentum", "weights"):
        found.update(cp.asnumpy(state[name]).tobytes())
    print("digest", found.hexdigest())


if __name__ == "__main__":
    main()
