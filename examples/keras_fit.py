"""Keras 3: a `fit` that goes on at the batch where it was, bit for bit, however it ended.

    pip install -e '.[keras]' torch
    python examples/keras_fit.py --root runs/keras --steps 200

Kill it and start it again.  The one line that is gpuckpt's is the callback.
"""

import argparse
import hashlib
import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np

import gpuckpt
from gpuckpt.adapters.keras import Checkpoint

BATCHES = 16


class Tell(keras.callbacks.Callback):
    """Prints each step that is trained; ends after the last."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.begun = steps, 0

    def on_epoch_begin(self, epoch, logs=None):
        """Count from here."""
        del logs
        self.begun = epoch * BATCHES

    def on_train_batch_end(self, batch, logs=None):
        """After the optimizer's step."""
        step = self.begun + batch + 1
        if logs:  # a batch that is only passed over has none
            print("step", step, flush=True)
        if step >= self.steps:
            self.model.stop_training = True


def main() -> None:
    """Train, with a checkpoint every five steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", required=True)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    keras.utils.set_random_seed(0)
    draw = np.random.default_rng(0)
    labels = draw.integers(10, size=BATCHES * 64)
    images = draw.standard_normal((10, 64))[labels] + draw.standard_normal((len(labels), 64))
    layers = [keras.layers.Dense(128), keras.layers.BatchNormalization(), keras.layers.ReLU()]
    head = [keras.layers.Dropout(0.2), keras.layers.Dense(10, activation="softmax")]
    model = keras.Sequential([keras.layers.Input((64,)), *layers, *head])
    model.compile("adam", "sparse_categorical_crossentropy", jit_compile=False)
    checkpoint = Checkpoint(options.root, every=gpuckpt.Every(steps=5), keep=gpuckpt.Keep(last=2))
    model.fit(
        *(images.astype("float32"), labels),
        batch_size=64,
        epochs=-(-options.steps // BATCHES),
        callbacks=[Tell(options.steps), checkpoint],
        verbose=0,
    )

    weights = [keras.ops.convert_to_numpy(value) for value in model.get_weights()]
    print("digest", hashlib.sha256(b"".join(one.tobytes() for one in weights)).hexdigest())


if __name__ == "__main__":
    main()
