"""The training process: `python -m gpuckpt.demo.train --root … --digests …`.

It trains with or without checkpoints, tells on standard output how that goes
(`journal.py`), and leaves the digests of the state that it ends with.
"""

from __future__ import annotations

import argparse
import json
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

import gpuckpt
from gpuckpt.demo.adam import Adam
from gpuckpt.demo.digests import digests
from gpuckpt.demo.journal import Journal
from gpuckpt.demo.layers import Array
from gpuckpt.demo.model import Model, initial
from gpuckpt.demo.settings import Settings, add_arguments, parse
from gpuckpt.demo.text import Batches, corpus

DROPPED = 0.1  # the share of the embedding that a step ignores


def run(root: Path | None, settings: Settings, *, arrays: str = "auto") -> dict[str, Any]:
    """Train to the last step, from the newest checkpoint of `root`, and return the state.

    Without a root the same loop runs without checkpoints.
    """
    xp = array_module(arrays)
    trainer = Trainer(xp, settings)
    state = trainer.initial_state()
    journal = Journal()
    with checkpoints(root, settings) as ckpt:
        done = ckpt.resume(state)
        journal.begin(done, state["model"], xp)
        for step in range(done + 1, settings.steps + 1):
            loss, gradients = trainer.forward_backward(state)
            with ckpt.update():
                trainer.optimizer_step(state, gradients)
            journal.step(step, loss, ckpt.step(step, state, metrics={"loss": loss}))
        journal.end()
    return state


@dataclass(frozen=True, slots=True)
class Trainer:
    """The model, the optimizer and the batches, on the array module `xp`."""

    xp: Any
    settings: Settings

    def initial_state(self) -> dict[str, Any]:
        """Return all that a run's next step depends on, as it is before the first."""
        seed = self.settings.seed
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 (the generator that RNG carries)
        parameters = initial(self.xp, self.settings)
        return {
            "model": parameters,
            "optimizer": Adam(self.xp).initial(parameters),
            "rng": gpuckpt.RNG(),
            "data": Batches(corpus(self.settings.corpus_nbytes), seed=seed),
        }

    def forward_backward(self, state: dict[str, Any]) -> tuple[float, dict[str, Array]]:
        """Return the loss on the next batch, and its gradients."""
        sizes = self.settings
        inputs, targets = state["data"].draw(sizes.batch, sizes.context)
        keep = dropout(sizes.batch * sizes.context, sizes.width)
        device = self.xp.asarray
        model = Model(self.xp, sizes)
        loss, gradients = model.loss_and_gradients(
            state["model"], device(inputs), device(targets), device(keep)
        )
        return float(loss), gradients

    def optimizer_step(self, state: dict[str, Any], gradients: dict[str, Array]) -> None:
        """Change the parameters and the moments, in place."""
        Adam(self.xp).update(state["model"], state["optimizer"], gradients)


def dropout(rows: int, columns: int) -> npt.NDArray[np.float32]:
    """Return zeros where the embedding is dropped, and what keeps its mean elsewhere.

    Drawn on the host from numpy's global generator: a resumed run draws the
    same only if that generator came back too.
    """
    kept = np.random.random((rows, columns)) >= DROPPED  # noqa: NPY002 (as above)
    return kept.astype(np.float32) / np.float32(1 - DROPPED)


def array_module(name: str = "auto") -> Any:
    """Return numpy or cupy as named; "auto" is cupy where it finds a GPU."""
    if name == "numpy":
        return np
    try:
        import cupy

        cupy.cuda.Device(0).use()
    except Exception:
        if name == "cupy":
            raise
        return np
    return cupy


class NoCheckpoints:
    """Stands in for the checkpointer in a run that saves nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        """Have nothing to wait for."""

    def resume(self, state: dict[str, Any]) -> int:
        """Leave `state` as it begins."""
        assert state
        return 0

    def update(self) -> AbstractContextManager[None]:
        """Order nothing."""
        return nullcontext()

    def step(self, step: int, state: dict[str, Any], *, metrics: dict[str, float]) -> None:
        """Save nothing."""


def checkpoints(root: Path | None, settings: Settings) -> gpuckpt.Checkpointer | NoCheckpoints:
    """Return what saves every few steps to `root`, or what never saves."""
    if root is None:
        return NoCheckpoints()
    every = gpuckpt.Every(steps=settings.every)
    return gpuckpt.Checkpointer(root, every=every, keep=gpuckpt.Keep(last=2))


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, help="where checkpoints go; none are made without")
    parser.add_argument("--digests", type=Path, help="a JSON file for the final state's digests")
    parser.add_argument("--arrays", choices=("auto", "numpy", "cupy"), default="auto")
    add_arguments(parser)
    options = parser.parse_args()
    state = run(options.root, parse(options), arrays=options.arrays)
    if options.digests:
        options.digests.write_text(json.dumps(digests(state), indent=1))


if __name__ == "__main__":
    main()
