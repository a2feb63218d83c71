"""What each rank of a run holds: a model's tensors, sharded or replicated."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gpuckpt.boxes import Box
from gpuckpt.inventory import Inventory, Roster
from gpuckpt.spec import Spec
from gpuckpt.values import Json

# Llama 3.1 405B's widths; 32 layers of them are 291 tensors, as many as Llama 3.1 8B has.
HIDDEN, WIDE, KEYS, WORDS = 16384, 53248, 1024, 128256
DTYPE, ITEM_NBYTES = "bfloat16", 2
# What torch's generator of the CPU has.
RNG_NBYTES = 5056
# Ranks of a node, over which `hsdp` shards; it replicates over nodes.
NODE = 8
KINDS = ("fsdp", "hsdp", "replicated")
WRITTEN = ("fsdp", "replicated")

Shapes = list[tuple[str, tuple[int, ...]]]


def model(layers: int) -> Shapes:
    """Names and shapes of the model's tensors: nine a layer, and three."""
    return [
        ("model.embed_tokens.weight", (WORDS, HIDDEN)),
        *(one for layer in range(layers) for one in _layer(f"model.layers.{layer}.")),
        ("model.norm.weight", (HIDDEN,)),
        ("lm_head.weight", (WORDS, HIDDEN)),
    ]


def _layer(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}self_attn.q_proj.weight", (HIDDEN, HIDDEN)
    yield f"{name}self_attn.k_proj.weight", (KEYS, HIDDEN)
    yield f"{name}self_attn.v_proj.weight", (KEYS, HIDDEN)
    yield f"{name}self_attn.o_proj.weight", (HIDDEN, HIDDEN)
    yield f"{name}mlp.gate_proj.weight", (WIDE, HIDDEN)
    yield f"{name}mlp.up_proj.weight", (WIDE, HIDDEN)
    yield f"{name}mlp.down_proj.weight", (HIDDEN, WIDE)
    yield f"{name}input_layernorm.weight", (HIDDEN,)
    yield f"{name}post_attention_layernorm.weight", (HIDDEN,)


def roster(kind: str, rank: int, ranks: int, shapes: Shapes) -> Roster:
    """What a rank holds: boxes along the first axis, or all; and a generator of its own."""
    specs = [_spec(name, shape, kind, rank, ranks) for name, shape in shapes]
    specs.append(Spec("rng", "uint8", (RNG_NBYTES,)))
    pairs: list[Json] = [[name, {"tensor": at}] for at, (name, _) in enumerate(shapes)]
    pairs.append(["rng", {"rank": {"tensor": len(shapes)}}])
    strides = tuple(_strides(spec) for spec in specs)
    return Roster({"dict": pairs}, tuple(specs), strides)


def inventory(held: Roster) -> Inventory:
    """With addresses at which nothing is."""
    count = len(held.specs)
    return Inventory(held, np.zeros(count, np.uint64), [None] * count, ())


def _spec(name: str, shape: tuple[int, ...], kind: str, rank: int, ranks: int) -> Spec:
    count, at = {
        "fsdp": (ranks, rank),
        "hsdp": (min(ranks, NODE), rank % NODE),
        "replicated": (1, 0),
    }[kind]
    if count == 1:
        return Spec(name, DTYPE, shape)
    box = shard(shape, at, count)
    return Spec(name, DTYPE, box.shape, offset=box.offset, whole=shape)


def shard(shape: tuple[int, ...], at: int, count: int) -> Box:
    """The box of one of `count`, cut as FSDP2 does: the last ones are smaller, or empty."""
    rows = -(-shape[0] // count)
    first, last = (min(rows * i, shape[0]) for i in (at, at + 1))
    rest = shape[1:]
    return Box((first, *(0 for _ in rest)), (last - first, *rest))


def _strides(spec: Spec) -> tuple[int, ...]:
    strides, step = [], 1 if spec.dtype == "uint8" else ITEM_NBYTES
    for extent in reversed(spec.shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))
