"""The layers of the model, each a forward function and the backward function that follows it.

A forward function returns what comes out and, where the backward one needs
more than the inputs, a cache.  A backward function takes the gradient of the
loss by the output, `dy`, and returns those by the inputs.  All arrays are of
the module `xp`, numpy or cupy, and of one float dtype; `n` is batch x context.
"""

from __future__ import annotations

from typing import Any

Array = Any  # of numpy or of cupy
Cache = tuple[Array, ...]

EPSILON = 1e-5


def linear(x: Array, weight: Array, bias: Array) -> Array:
    """float[n, i] → float[n, o], for a weight float[i, o] and a bias float[o]."""
    return x @ weight + bias


def linear_back(dy: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Return the gradients by x, by the weight and by the bias."""
    return dy @ weight.T, x.T @ dy, dy.sum(axis=0)


def norm(x: Array, gain: Array, bias: Array) -> tuple[Array, Cache]:
    """Shift and scale each row to mean 0 and variance 1, then by gain and bias."""
    centred = x - x.mean(axis=1, keepdims=True)
    scale = ((centred * centred).mean(axis=1, keepdims=True) + EPSILON) ** -0.5
    unit = centred * scale
    return unit * gain + bias, (unit, scale)


def norm_back(dy: Array, gain: Array, cache: Cache) -> tuple[Array, Array, Array]:
    """Return the gradients by x, by the gain and by the bias."""
    unit, scale = cache
    dunit = dy * gain
    along = (dunit * unit).mean(axis=1, keepdims=True)
    dx = (dunit - dunit.mean(axis=1, keepdims=True) - unit * along) * scale
    return dx, (dy * unit).sum(axis=0), dy.sum(axis=0)


def squared_relu(xp: Any, x: Array) -> tuple[Array, Array]:
    """Return max(x, 0)², and max(x, 0) for the way back: smooth enough to differentiate."""
    positive = xp.maximum(x, 0)
    return positive * positive, positive


def squared_relu_back(dy: Array, positive: Array) -> Array:
    """Return the gradient by x."""
    return 2 * dy * positive


def attention(xp: Any, qkv: Array, batch: int, heads: int) -> tuple[Array, Cache]:
    """Let each character look at itself and those before it: float[n, 3·w] → float[n, w]."""
    n, columns = qkv.shape
    context, width = n // batch, columns // 3
    split = qkv.reshape(batch, context, 3, heads, width // heads)
    q, k, v = split.transpose(2, 0, 3, 1, 4)  # each [batch, heads, context, width/heads]
    scores = q @ k.swapaxes(2, 3) * (width // heads) ** -0.5
    scores = xp.where(xp.tri(context, dtype=bool), scores, -xp.inf)
    weights = softmax(xp, scores)
    y = (weights @ v).swapaxes(1, 2).reshape(n, width)
    return y, (q, k, v, weights)


def attention_back(xp: Any, dy: Array, cache: Cache) -> Array:
    """Return the gradient by qkv.

    No gradient flows through the masked scores: their weights are zero.
    """
    q, k, v, weights = cache
    batch, heads, context, each = q.shape
    dout = dy.reshape(batch, context, heads, each).swapaxes(1, 2)
    dweights = dout @ v.swapaxes(2, 3)
    inner = (dweights * weights).sum(axis=3, keepdims=True)
    dscores = weights * (dweights - inner) * each**-0.5
    parts = (dscores @ k, dscores.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ dout)
    return xp.stack(parts).transpose(1, 3, 0, 2, 4).reshape(batch * context, 3 * heads * each)


def softmax(xp: Any, x: Array) -> Array:
    """Return exp(x), scaled along the last axis to the sum 1."""
    powers = xp.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def cross_entropy(xp: Any, logits: Array, targets: Array) -> tuple[Array, Array]:
    """Return the mean of -log p(target), in nats, and its gradient by the logits."""
    rows = xp.arange(len(targets))
    probabilities = softmax(xp, logits)
    loss = -xp.log(probabilities[rows, targets]).mean()
    gradient = probabilities / len(targets)
    gradient[rows, targets] -= 1 / len(targets)
    return loss, gradient
