"""numba: compiled loops over numpy's arrays factorise a table of ratings, and are resumed.

    python examples/numba_loop.py --root /tmp/run --steps 200

Kill it and start it again: it ends with the same bits. numba.cuda's device arrays are leaves of a
state as numpy's are.
"""

import argparse
import hashlib

import numba
import numpy as np

import gpuckpt

PEOPLE, FILMS, TASTES, RATINGS = 300, 200, 16, 4000


@numba.njit
def train(people, films, table, order):
    """One pass over all ratings, in an order; what it learns is changed in place."""
    of_whom, of_what, ratings = table
    loss = 0.0
    for at in order:
        who, what = of_whom[at], of_what[at]
        error = ratings[at]
        for k in range(people.shape[1]):
            error -= people[who, k] * films[what, k]
        for k in range(people.shape[1]):
            taste = people[who, k]
            people[who, k] += 0.02 * (error * films[what, k] - 0.05 * taste)
            films[what, k] += 0.02 * (error * taste - 0.05 * films[what, k])
        loss += error * error
    return loss / len(order)


def start():
    """The table, and what is learned from it."""
    draw = np.random.default_rng(0)
    of_whom, of_what = draw.integers(PEOPLE, size=RATINGS), draw.integers(FILMS, size=RATINGS)
    true = draw.standard_normal((PEOPLE, 4)), draw.standard_normal((FILMS, 4))
    ratings = (true[0][of_whom] * true[1][of_what]).sum(axis=1)
    np.random.seed(0)  # noqa: NPY002 - the generator that gpuckpt.RNG saves; numba's own isn't
    state = {
        "people": draw.standard_normal((PEOPLE, TASTES)) / 10,
        "films": draw.standard_normal((FILMS, TASTES)) / 10,
        "random": gpuckpt.RNG(),
    }
    return state, (of_whom, of_what, ratings)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    state, table = start()
    with gpuckpt.Checkpointer(options.root, every=gpuckpt.Every(steps=5)) as ckpt:
        done = ckpt.resume(state)
        for step in range(done + 1, options.steps + 1):
            order = np.random.permutation(RATINGS)  # noqa: NPY002
            with ckpt.update():
                loss = train(state["people"], state["films"], table, order)
            ckpt.step(step, state, metrics={"loss": loss})
            print(f"step {step}", flush=True)

    found = hashlib.sha256(state["films"].tobytes() + state["people"].tobytes())
    print("digest", found.hexdigest())


if __name__ == "__main__":
    main()
