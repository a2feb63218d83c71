"""Runs of Keras's, in a process whose environment says on which backend; prints what came of them.

KERAS_BACKEND=jax python -m tests.frameworks.keras_fits DIRECTORY
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np

import gpuckpt
from gpuckpt.adapters.keras import Checkpoint
from tests.frameworks.trainings import StopError

INPUTS = np.random.default_rng(1).standard_normal((56, 8)).astype("float32")
TARGETS = INPUTS.sum(1, keepdims=True)
BATCHES = 7


class Watch(keras.callbacks.Callback):
    """Notes how many batches were trained on, and fails after a step if it is to."""

    def __init__(self, stop: int | None) -> None:
        super().__init__()
        self.stop, self.trained, self.begun = stop, 0, 0
        self.losses: list[float] = []

    def on_epoch_begin(self, epoch, logs=None):
        self.begun = epoch * BATCHES

    def on_train_batch_end(self, batch, logs=None):
        self.trained += bool(logs)
        if self.stop is not None and self.begun + batch + 1 >= self.stop:
            raise StopError

    def on_epoch_end(self, epoch, logs=None):
        self.losses.append(logs["loss"])


class Cut(keras.callbacks.Callback):
    """Has the training stop after a step, in the middle of an epoch."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            self.model.stop_training = True


class Saves:
    """Notes the step of every save."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def saved(self, record: Any) -> None:
        self.steps.append(record.stats.step)


def made(units: int = 4) -> Any:
    keras.utils.set_random_seed(0)
    inner = [keras.layers.Dense(units), keras.layers.BatchNormalization()]
    outer = [keras.layers.Dropout(0.3), keras.layers.Dense(1)]
    model = keras.Sequential([keras.layers.Input((8,)), *inner, *outer])
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    return model


def fit(root: Path, stop: int | None = None, **options: Any) -> dict[str, Any]:
    """Train three epochs, or until `stop`."""
    model, watch = made(options.pop("units", 4)), Watch(stop)
    executed = options.pop("steps_per_execution", 1)
    model.steps_per_execution = executed
    preempt, every = options.pop("preempt", None), options.pop("every", gpuckpt.Every(steps=1))
    saves = Saves()
    saving = Checkpoint(
        root, every=every, keep=gpuckpt.Keep(last=2), preempt=preempt, observers=[saves]
    )
    data: dict[str, Any] = {"x": INPUTS, "y": TARGETS, "epochs": 3, "batch_size": 8}
    if options.pop("unsized", False):
        data = {"x": ((INPUTS[at : at + 8], TARGETS[at : at + 8]) for at in range(0, 56, 8))}
    cut = [Cut(options.pop("cut"))] if "cut" in options else []
    try:
        model.fit(callbacks=[watch, *cut, saving], **{"verbose": 0} | data | options)
    except StopError:
        saving.close()
    weights = b"".join(np.asarray(one).tobytes() for one in model.get_weights())
    found = {"digest": hashlib.sha256(weights).hexdigest(), "trained": watch.trained}
    return {**found, "losses": watch.losses, "saves": saves.steps}


def resumed(root: Path, stops: tuple[int, ...], **options: Any) -> dict[str, Any]:
    """A run that was ended and went on."""
    for stop in stops:
        fit(root, stop, **options)
    return fit(root, **options)


def metrics_of(root: Path, snapshot: str, *, sized: bool = True) -> list[float]:
    """The metrics in the checkpoint of an epoch's last batch, of data that has a length or none."""
    model, every = made(), gpuckpt.Every(steps=BATCHES)
    saving = Checkpoint(root, every=every, snapshot=snapshot, codec="raw")
    batches = ((INPUTS[at : at + 8], TARGETS[at : at + 8]) for at in range(0, 56, 8))
    if sized:
        model.fit(INPUTS, TARGETS, callbacks=[saving], epochs=2, batch_size=8, verbose=0)
    else:
        checked = (INPUTS[:9], TARGETS[:9])
        model.fit(batches, callbacks=[saving], validation_data=checked, verbose=0)
    found = gpuckpt.load(root, BATCHES, like="numpy")["metrics"]
    return [float(found[name].sum()) for name in sorted(found)]


def refused(root: Path) -> str:
    """What a model of other shapes is told."""
    try:
        fit(root, units=5)
    except gpuckpt.MismatchError as error:
        return str(error)
    return ""


def main() -> None:
    numbers = itertools.count()
    base = Path(sys.argv[1])

    def root() -> Path:
        return base / str(next(numbers))

    validated: dict[str, Any] = {"validation_data": (INPUTS[:9], TARGETS[:9])}
    ends = gpuckpt.Every(steps=BATCHES, epochs=1, seconds=1e-9)
    two, short = root(), root()
    twice, cut = fit(two, epochs=2, every=ends), fit(short, cut=4, every=gpuckpt.Every(steps=3))
    unsized = fit(root(), unsized=True, every=ends)
    plain, checked = fit(root()), fit(root(), **validated)
    found: dict[str, Any] = {
        "twice": [checked, resumed(root(), (3, 12), **validated)],
        "boundary": [plain, resumed(root(), (7,))],
        "epochs": [checked, resumed(root(), (11,), every=gpuckpt.Every(epochs=1), **validated)],
        "longer": [plain, fit(two)],
        "cut": [plain, fit(short)],
        "unsized": [unsized, resumed(root(), (6,), unsized=True)],
        "saves": [one["saves"] for one in (twice, unsized, cut)],
        "refused": refused(two),
        "metrics": [
            metrics_of(root(), "copy"),
            metrics_of(root(), "hold"),
            metrics_of(root(), "hold", sized=False),
        ],
        "preempted": fit(root(), preempt=lambda: True)["trained"],
        "names": sorted(gpuckpt.load(two, like="numpy")["model"]),
    }
    if keras.backend.backend() == "jax":  # on torch, Keras executes each step alone
        both: dict[str, Any] = {"steps_per_execution": 2}
        found["together"] = [fit(root(), **both), resumed(root(), (9,), **both)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
