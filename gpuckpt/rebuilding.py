"""A step without its manifest: which data files are its own, and what they say of themselves."""

from __future__ import annotations

import contextlib
import re

from gpuckpt import layout
from gpuckpt.commit import steps
from gpuckpt.errors import CheckpointError, NotFoundError
from gpuckpt.manifest import Manifest
from gpuckpt.seal import Seal
from gpuckpt.segments import read_index
from gpuckpt.sources import joined, manifest_of
from gpuckpt.stores import Store, read_all
from gpuckpt.tensors import TensorEntry


def step_of(store: Store, step: int | None) -> int:
    """The step to be salvaged: the one named, else the newest, be it damaged.

    Raises:
        NotFoundError: there is nothing of it.
    """
    segments = {layout.segment_step(name) for name in store.names()}
    there = {*steps(store), *(one for one in segments if one is not None)}
    if step is None and there:
        return max(steps(store) or there)
    if step not in there or step is None:
        known = ", ".join(map(str, sorted(there)[-10:])) or "none"
        raise NotFoundError(f"{store.root}: no files of {_told(step)} are there; steps: {known}")
    return step


def _told(step: int | None) -> str:
    return "any step" if step is None else f"step {step}"


def rebuilt(store: Store, step: int, seal: Seal | None = None) -> tuple[Manifest, list[str]]:
    """What the data files of a step say of themselves, and what is to be said of that.

    Some of its tensors, or parts of them, by name; no plain values.  With a
    `seal`, only what is sealed with its key.
    """
    tensors: list[TensorEntry] = []
    notes = []
    for name in _segments(store, step):
        try:
            _, entries = read_index(store, name, seal)
        except CheckpointError as error:
            notes.append(f"what {name} holds isn't known: {error}")
            continue
        tensors = joined(tensors, entries)
    return manifest_of(step, tensors), notes


def _segments(store: Store, step: int) -> list[str]:
    """The data files of the save that made a step: of several, the one that its manifest names."""
    saves: dict[str, list[str]] = {}
    for name in store.names():
        if layout.segment_step(name) == step:
            saves.setdefault(name.split(".")[1], []).append(name)
    if not saves:
        return []
    text = b""
    with contextlib.suppress(CheckpointError):
        text = read_all(store, layout.manifest_name(step))
    own = rb"step-%012d\.([0-9a-f]{8})\." % step
    named = {token.decode() for token in re.findall(own, text)} & set(saves)
    return saves[max(named or saves, key=lambda token: sum(map(store.size, saves[token])))]
