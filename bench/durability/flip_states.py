"""Checkpoints whose bits are flipped: every way in which a chunk can be stored, and many dtypes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import gpuckpt
from gpuckpt.commit import open_step
from gpuckpt.manifest import Manifest
from gpuckpt.spec import ChunkEntry
from gpuckpt.stores.local import LocalStore

CODECS = ("auto", "raw", "zstd", "delta")
STEPS = (1, 2, 3, 4)
CHUNK_NBYTES = 128 << 10  # of a master, so that its copies' chunks are whole leaves
MEMORY = "64 MiB"


def first_state(seed: int) -> dict[str, Any]:
    """A training state of half a megabyte, as it was before the first step."""
    rng = np.random.default_rng(seed)
    master = rng.standard_normal((160, 128)).astype("f4")
    dtypes = ("i8", "u2", ">f4", "f8", "c8", "M8[ms]", "?")
    others = {name: rng.integers(0, 2**15, 300).astype(name) for name in dtypes}
    return {
        "model": {
            "master": master,
            "bf16": master.astype(ml_dtypes.bfloat16),
            "f16": master.astype("f2"),
            "frozen": rng.standard_normal(9000).astype("f4"),
            "turned over": np.asfortranarray(rng.standard_normal((90, 70))),
        },
        "optimizer": [{"m": np.zeros((160, 128), "f4"), "table": np.zeros((1024, 64), "f4")}],
        "others": others | {"f8_e4m3": rng.standard_normal(500).astype(ml_dtypes.float8_e4m3fn)},
        "text": np.array(["a", "bc", "déf"]),
        "empty": np.zeros((0, 3)),
        "scalar": np.array(3.25),
        "values": {"lr": 1e-3, "step": 0, "name": "run", "seed": 2**70, "nan": float("nan")},
    }


def train(state: dict[str, Any], rng: np.random.Generator) -> None:
    """One step: all of the weights a little, a few rows of a table, and some values."""
    model, (optimizer,) = state["model"], state["optimizer"]
    change = (rng.standard_normal(model["master"].shape) * 1e-4).astype("f4")
    model["master"] += change
    model["bf16"][...] = model["master"].astype(ml_dtypes.bfloat16)
    model["f16"][...] = model["master"].astype("f2")
    optimizer["m"] += change
    optimizer["table"][rng.integers(0, 1024, 6)] += 1
    model["turned over"] *= 1.0 + 1e-6
    state["others"]["i8"] += 1
    state["values"]["step"] += 1


@dataclass(frozen=True, slots=True)
class Root:
    """A root, what each of its steps holds, and their manifests."""

    path: Path
    codec: str
    wanted: dict[int, dict[str, Any]] = field(default_factory=dict)
    manifests: dict[int, Manifest] = field(default_factory=dict)

    @property
    def store(self) -> LocalStore:
        """Its files."""
        return LocalStore(self.path)


def make_root(path: Path, codec: str, seed: int) -> Root:
    """Save the steps of a run."""
    root, state, rng = Root(path, codec), first_state(seed), np.random.default_rng(seed)
    with gpuckpt.Checkpointer(
        path, codec=codec, memory=MEMORY, chunk_nbytes=CHUNK_NBYTES
    ) as checkpointer:
        for step in STEPS:
            with checkpointer.update():
                train(state, rng)
            checkpointer.save(step, state, metrics={"loss": 1 / step}).result(60)
            root.wanted[step] = deepcopy(state)
    root.manifests.update({step: open_step(root.store, step) for step in STEPS})
    return root


def kind_of(chunk: ChunkEntry, link: ChunkEntry) -> str:
    """How a chunk is stored, or what of another one it is."""
    if chunk.sources:
        return "the source of a derived chunk"
    if link is not chunk:
        return "the base of a delta"
    sparse = any(plane.parts for plane in link.planes)
    if link.base is not None:
        return "a sparse delta" if sparse else "a delta"
    return "a chunk"


def exact(found: Any, wanted: Any) -> bool:
    """Whether two states are the same to the last bit."""
    if isinstance(wanted, dict):
        return (
            isinstance(found, dict)
            and list(found) == list(wanted)
            and all(exact(found[name], wanted[name]) for name in wanted)
        )
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(exact, found, wanted))
    if isinstance(wanted, np.ndarray):
        same = (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        return same and found.tobytes() == wanted.tobytes()
    return type(found) is type(wanted) and repr(found) == repr(wanted)


def names_in(tree: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """The names of the arrays in a state."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, child in items:
        if isinstance(child, dict | list):
            yield from names_in(child, (*path, str(key)))
        elif isinstance(child, np.ndarray):
            yield ".".join((*path, str(key)))


def leaf_of(tree: Any, name: str) -> Any:
    """The leaf of a name."""
    for key in name.split("."):
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    return tree


def some_bit(rng: random.Random, begin: int, end: int) -> tuple[int, int]:
    """A byte from `begin` to before `end`, and a bit of it."""
    return rng.randrange(begin, end), 1 << rng.randrange(8)
