"""all-MiniLM-L6-v2 in PyTorch: BERT's encoder, the mean of what it says, and adapters for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from bench.training.words import PAD

Tensors = dict[str, Any]

LAYERS, HEADS, EPSILON = 6, 12, 1e-12
RANK, ALPHA = 8, 16
ADAPTED = ("query", "value")
SCALE = 20  # of cosines, before the softmax


def loss_of(weights: Mapping[str, Any], left: Any, right: Any, adapters: Tensors) -> Any:
    """Of texts int64[n, tokens], how badly each finds its partner among all of the batch.

    The objective that the published weights were made with.
    """
    one, other = (functional.normalize(encoded(weights, some, adapters)) for some in (left, right))
    return functional.cross_entropy(SCALE * one @ other.T, torch.arange(len(one)))


def encoded(weights: Mapping[str, Any], ids: Any, adapters: Tensors) -> Any:
    """float[n, 384] for texts int64[n, tokens]."""
    seen = ids != PAD
    place = weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = weights["embeddings.word_embeddings.weight"][ids] + place
    x = _norm(weights, "embeddings", x + weights["embeddings.token_type_embeddings.weight"][0])
    for layer in range(LAYERS):
        x = _layer(weights, f"encoder.layer.{layer}", x, seen, adapters)
    mask = seen[..., None].to(x.dtype)
    return (x * mask).sum(1).float() / mask.sum(1).float()


def new_adapters(width: int, seed: int) -> Tensors:
    """LoRA's two factors for each of the `ADAPTED`: normally distributed, and zeros."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for layer in range(LAYERS):
        for name in ADAPTED:
            at = f"encoder.layer.{layer}.attention.self.{name}"
            made[f"{at}.down"] = torch.randn(RANK, width, generator=generator) / width**0.5
            made[f"{at}.up"] = torch.zeros(width, RANK)
    return made


def _layer(weights: Mapping[str, Any], at: str, x: Any, seen: Any, adapters: Tensors) -> Any:
    n, tokens, width = x.shape
    parts = [
        _linear(weights, f"{at}.attention.self.{name}", x, adapters)
        .view(n, tokens, HEADS, width // HEADS)
        .transpose(1, 2)
        for name in ("query", "key", "value")
    ]
    mixed = functional.scaled_dot_product_attention(*parts, attn_mask=seen[:, None, None, :])
    mixed = mixed.transpose(1, 2).reshape(n, tokens, width)
    x = x + _linear(weights, f"{at}.attention.output.dense", mixed, adapters)
    x = _norm(weights, f"{at}.attention.output", x)
    hidden = functional.gelu(_linear(weights, f"{at}.intermediate.dense", x, adapters))
    x = x + _linear(weights, f"{at}.output.dense", hidden, adapters)
    return _norm(weights, f"{at}.output", x)


def _linear(weights: Mapping[str, Any], at: str, x: Any, adapters: Tensors) -> Any:
    y = functional.linear(x, weights[f"{at}.weight"], weights[f"{at}.bias"])
    if f"{at}.down" in adapters:
        low = functional.linear(x, adapters[f"{at}.down"].to(x.dtype))
        y = y + ALPHA / RANK * functional.linear(low, adapters[f"{at}.up"].to(x.dtype))
    return y


def _norm(weights: Mapping[str, Any], at: str, x: Any) -> Any:
    gain, bias = (weights[f"{at}.LayerNorm.{name}"] for name in ("weight", "bias"))
    return functional.layer_norm(x, x.shape[-1:], gain, bias, EPSILON)
