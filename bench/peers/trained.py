"""A language model trained on real text with Adam: parameters and both moments, k and k+1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from bench.peers.cache import AFTER, BEFORE, Array, Arrays, Keep, Workload
from gpuckpt.demo.adam import Adam
from gpuckpt.demo.model import Model, block_shapes, initial
from gpuckpt.demo.settings import Settings
from gpuckpt.demo.text import SYMBOLS, Batches, corpus

STEPS = 200
_COPIES = 3  # parameters, exp_avg, exp_avg_sq


def settings_for(nbytes: int, steps: int = STEPS) -> Settings:
    """A model whose parameters and moments in float32 take about `nbytes`."""
    width = 1024 if nbytes >= 400e6 else 512 if nbytes >= 40e6 else 64
    block = sum(int(np.prod(shape)) for shape in block_shapes(width).values())
    rest = 2 * SYMBOLS * width
    depth = max(1, round((nbytes / 4 / _COPIES - rest) / block))
    return Settings(steps=steps, every=1, batch=4, context=32, width=width, depth=depth, heads=4)


def train(nbytes: int, keep: Keep, steps: int = STEPS) -> dict[str, Any]:
    """Train for `steps` steps and for one more; hand over the state after both."""
    settings = settings_for(nbytes, steps)
    parameters = initial(np, settings)
    adam = Adam(np, rate=5e-4)
    moments = adam.initial(parameters)
    model = Model(np, settings)
    batches = Batches(corpus(settings.corpus_nbytes), seed=settings.seed)
    everything = np.ones((settings.batch * settings.context, settings.width), np.float32)
    losses = []
    for step in range(1, steps + 2):
        inputs, targets = batches.draw(settings.batch, settings.context)
        loss, gradients = model.loss_and_gradients(parameters, inputs, targets, everything)
        adam.update(parameters, moments, gradients)
        losses.append(float(loss))
        if step >= steps:
            keep(BEFORE if step == steps else AFTER, _named(parameters, moments))
    return {
        "what": "a causal transformer on characters, trained with Adam; params and both moments",
        "width": settings.width,
        "depth": settings.depth,
        "steps": steps,
        "seed": settings.seed,
        "loss_first": losses[0],
        "loss_last_10": float(np.mean(losses[-10:])),
    }


def round_to_bfloat16(source: Workload, keep: Keep) -> dict[str, Any]:
    """The same two checkpoints in bfloat16."""
    for which in (BEFORE, AFTER):
        arrays = source.load(which)
        keep(which, {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()})
    return source.facts | {"rounded_to": "bfloat16"}


def _named(parameters: Mapping[str, Array], moments: Mapping[str, Any]) -> Arrays:
    parts = {"model": parameters} | {name: moments[name] for name in ("exp_avg", "exp_avg_sq")}
    return {f"{part}.{name}": one for part, some in parts.items() for name, one in some.items()}
