"""A character-level language model: a causal transformer, forward and backward by hand.

    x = dropout(symbol[input] + place)
    for each block:  x += attention(norm(x));  x += squared_relu(norm(x) up) down
    loss = cross_entropy(norm(x) head, target)

The same operations on the same machine give the same bits: no atomic
additions (the embedding's gradient is a product with one-hot rows) and
nothing that depends on time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuckpt.demo import layers
from gpuckpt.demo.layers import Array
from gpuckpt.demo.settings import Settings
from gpuckpt.demo.text import SYMBOLS

Tensors = dict[str, Array]

DEVIATION = 0.03  # of the weights at the start, small enough that all characters are as likely


def initial(xp: Any, settings: Settings, dtype: str = "float32") -> Tensors:
    """Return the parameters that every run with these settings begins with."""
    generator = np.random.default_rng(settings.seed)
    width = settings.width
    shapes: dict[str, tuple[int, ...]] = {
        "symbol": (SYMBOLS, width),
        "place": (settings.context, width),
    }
    for index in range(settings.depth):
        shapes |= {f"block{index}.{name}": shape for name, shape in block_shapes(width).items()}
    shapes |= {"norm.gain": (width,), "norm.bias": (width,)}
    shapes |= {"head.weight": (width, SYMBOLS), "head.bias": (SYMBOLS,)}
    return {
        name: xp.asarray(initial_value(generator, name, shape).astype(dtype))
        for name, shape in shapes.items()
    }


def block_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one block's parameters."""
    return {
        "norm1.gain": (width,),
        "norm1.bias": (width,),
        "qkv.weight": (width, 3 * width),
        "qkv.bias": (3 * width,),
        "mix.weight": (width, width),
        "mix.bias": (width,),
        "norm2.gain": (width,),
        "norm2.bias": (width,),
        "up.weight": (width, 4 * width),
        "up.bias": (4 * width,),
        "down.weight": (4 * width, width),
        "down.bias": (width,),
    }


def initial_value(generator: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    """Gains begin at one, biases at zero, all others at random."""
    if name.endswith("gain"):
        return np.ones(shape)
    if name.endswith("bias"):
        return np.zeros(shape)
    return generator.standard_normal(shape) * DEVIATION


@dataclass(frozen=True, slots=True)
class Model:
    """The model on the array module `xp`; parameters are passed in and never changed."""

    xp: Any
    settings: Settings

    def loss_and_gradients(
        self, p: Tensors, inputs: Array, targets: Array, keep: Array
    ) -> tuple[Array, Tensors]:
        """Return the loss, of no dimensions, and its gradient by each of the parameters `p`.

        `inputs` and `targets` are int64[batch, context]; `keep`, float[n, width],
        multiplies the embedded characters (dropout).
        """
        blocks = range(self.settings.depth)
        x = (p["symbol"][inputs] + p["place"]).reshape(keep.shape) * keep
        caches = []
        for index in blocks:
            x, cache = self._block(p, f"block{index}", x, len(inputs))
            caches.append(cache)
        loss, dx, gradients = self._head(p, x, targets.reshape(-1))
        for index in reversed(blocks):
            dx = self._block_back(p, gradients, f"block{index}", dx, caches[index])
        dx = dx * keep
        one_hot = (inputs.reshape(-1, 1) == self.xp.arange(SYMBOLS)).astype(dx.dtype)
        gradients["symbol"] = one_hot.T @ dx
        gradients["place"] = dx.reshape(len(inputs), *p["place"].shape).sum(axis=0)
        return loss, gradients

    def _block(self, p: Tensors, at: str, x: Array, batch: int) -> tuple[Array, dict[str, Any]]:
        xp, heads = self.xp, self.settings.heads
        a, norm1 = layers.norm(x, p[f"{at}.norm1.gain"], p[f"{at}.norm1.bias"])
        qkv = layers.linear(a, p[f"{at}.qkv.weight"], p[f"{at}.qkv.bias"])
        seen, looks = layers.attention(xp, qkv, batch, heads)
        x = x + layers.linear(seen, p[f"{at}.mix.weight"], p[f"{at}.mix.bias"])
        b, norm2 = layers.norm(x, p[f"{at}.norm2.gain"], p[f"{at}.norm2.bias"])
        up = layers.linear(b, p[f"{at}.up.weight"], p[f"{at}.up.bias"])
        hidden, positive = layers.squared_relu(xp, up)
        x = x + layers.linear(hidden, p[f"{at}.down.weight"], p[f"{at}.down.bias"])
        inputs = {"qkv": a, "mix": seen, "up": b, "down": hidden}
        return x, inputs | {"norm1": norm1, "norm2": norm2, "looks": looks, "positive": positive}

    def _block_back(
        self, p: Tensors, gradients: Tensors, at: str, dx: Array, cache: dict[str, Any]
    ) -> Array:
        dhidden = _linear_back(p, gradients, f"{at}.down", dx, cache["down"])
        dup = layers.squared_relu_back(dhidden, cache["positive"])
        db = _linear_back(p, gradients, f"{at}.up", dup, cache["up"])
        dx = dx + _norm_back(p, gradients, f"{at}.norm2", db, cache["norm2"])
        dseen = _linear_back(p, gradients, f"{at}.mix", dx, cache["mix"])
        dqkv = layers.attention_back(self.xp, dseen, cache["looks"])
        da = _linear_back(p, gradients, f"{at}.qkv", dqkv, cache["qkv"])
        return dx + _norm_back(p, gradients, f"{at}.norm1", da, cache["norm1"])

    def _head(self, p: Tensors, x: Array, targets: Array) -> tuple[Array, Array, Tensors]:
        gradients: Tensors = {}
        y, cache = layers.norm(x, p["norm.gain"], p["norm.bias"])
        logits = layers.linear(y, p["head.weight"], p["head.bias"])
        loss, dlogits = layers.cross_entropy(self.xp, logits, targets)
        dy = _linear_back(p, gradients, "head", dlogits, y)
        dx = _norm_back(p, gradients, "norm", dy, cache)
        return loss, dx, gradients


def _linear_back(p: Tensors, gradients: Tensors, at: str, dy: Array, x: Array) -> Array:
    dx, dweight, dbias = layers.linear_back(dy, x, p[f"{at}.weight"])
    gradients |= {f"{at}.weight": dweight, f"{at}.bias": dbias}
    return dx


def _norm_back(p: Tensors, gradients: Tensors, at: str, dy: Array, cache: layers.Cache) -> Array:
    dx, dgain, dbias = layers.norm_back(dy, p[f"{at}.gain"], cache)
    gradients |= {f"{at}.gain": dgain, f"{at}.bias": dbias}
    return dx
