"""The demo's language model, trained on text with Adam: in float32, with masters, in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from bench.training.runs import Run, Scale, State
from gpuckpt.demo.adam import Adam
from gpuckpt.demo.model import Model, initial
from gpuckpt.demo.settings import Settings
from gpuckpt.demo.text import Batches, corpus

RATE = 5e-4
MOMENTS = ("exp_avg", "exp_avg_sq")
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def runs() -> list[Run]:
    """One for each way to keep numbers."""
    made = []
    for name, what in (
        ("adam-f32", "parameters and both moments in float32"),
        ("adam-masters", "parameters in bfloat16; masters and both moments in float32"),
        ("adam-bf16", "parameters and both moments in bfloat16, rounded after each step"),
    ):
        facts: dict[str, Any] = {"rate": RATE}
        made.append(Run(name, f"a transformer on characters, {what}", _begin(name, facts), facts))
    return made


def _begin(name: str, facts: dict[str, Any]) -> Any:
    return lambda scale: _train(name, scale, facts)


def _train(name: str, scale: Scale, facts: dict[str, Any]) -> Iterator[State]:
    settings = Settings(
        steps=scale.warmup + scale.steps + 2,
        every=1,
        batch=4,
        context=scale.context,
        width=scale.width,
        depth=scale.depth,
    )
    adam, model = Adam(np, rate=RATE), Model(np, settings)
    parameters = initial(np, settings)
    moments = adam.initial(parameters)
    state = _state(name, parameters, moments)
    batches = Batches(corpus(settings.corpus_nbytes), seed=settings.seed)
    everything = np.ones((settings.batch * settings.context, settings.width), np.float32)
    losses = []
    for step in range(1, settings.steps):
        seen = parameters if name == "adam-f32" else _rounded(parameters)
        loss, gradients = model.loss_and_gradients(seen, *_drawn(batches, settings), everything)
        adam.update(parameters, moments, gradients)
        losses.append(float(loss))
        if name == "adam-bf16":
            for some in (parameters, *(moments[part] for part in MOMENTS)):
                for array in some.values():
                    array[...] = array.astype(_BFLOAT16)
        if step >= scale.warmup:
            _copy(name, parameters, moments, state)
            facts |= {"loss_first": losses[0], "loss_last_10": float(np.mean(losses[-10:]))}
            yield state


def _drawn(batches: Batches, settings: Settings) -> tuple[Any, Any]:
    return batches.draw(settings.batch, settings.context)


def _rounded(parameters: State) -> State:
    """What a bfloat16 model computes with, in float32."""
    return {name: array.astype(_BFLOAT16).astype(np.float32) for name, array in parameters.items()}


def _parts(name: str, parameters: State, moments: dict[str, Any]) -> dict[str, tuple[State, Any]]:
    """What is in the state: each part's values, and the type that it is kept in."""
    wide = _BFLOAT16 if name == "adam-bf16" else np.dtype(np.float32)
    parts = {"master" if name == "adam-masters" else "model": (parameters, wide)}
    if name == "adam-masters":
        parts["model"] = (parameters, _BFLOAT16)
    return parts | {part: (moments[part], wide) for part in MOMENTS}


def _state(name: str, parameters: State, moments: dict[str, Any]) -> State:
    return {
        f"{part}.{at}": array.astype(dtype)
        for part, (some, dtype) in _parts(name, parameters, moments).items()
        for at, array in some.items()
    }


def _copy(name: str, parameters: State, moments: dict[str, Any], state: State) -> None:
    for part, (some, _) in _parts(name, parameters, moments).items():
        for at, array in some.items():
            state[f"{part}.{at}"][...] = array
