"""Initialise a model, also a different one, by name from checkpoints and single data files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from gpuckpt import layout
from gpuckpt.commit import open_step
from gpuckpt.errors import MismatchError, NotFoundError
from gpuckpt.loading import fill_match
from gpuckpt.manifest import Manifest, TensorEntry
from gpuckpt.matching import Match, Rename, match
from gpuckpt.pending import Checkpoint
from gpuckpt.resources import Resources
from gpuckpt.segments import read_index
from gpuckpt.stores import Store
from gpuckpt.stores.local import LocalStore
from gpuckpt.tree import Flat, Path, flatten

Source = str | os.PathLike[str] | Checkpoint | tuple[str | os.PathLike[str], int]


@dataclass(frozen=True, slots=True)
class Report:
    """What `warm_start` did, by names of the state.

    `matched` maps a name to the source that it was filled from, `unmatched`
    a name that kept its initial value to the reason, and `unused` lists the
    names that sources had and the state doesn't.
    """

    matched: dict[str, str] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.matched)} matched, {len(self.unmatched)} kept their initial value"]
        lines += [f"  = {name}  from {source}" for name, source in self.matched.items()]
        lines += [f"  - {name}  {reason}" for name, reason in self.unmatched.items()]
        lines += [f"  + {name}  not in the state" for name in self.unused]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Opened:
    label: str
    store: Store
    manifest: Manifest


def warm_start(
    state: Any,
    sources: Source | Sequence[Source],
    *,
    rename: Rename = None,
    strict: bool = False,
    memory: int | str = "256 MiB",
) -> Report:
    """Fill the leaves of `state` that a source has under the same name; later sources win.

    A source is a root (its newest step), a pair of root and step, a
    `Checkpoint`, the path of a manifest, or the path of one segment, which
    needs no manifest.  Segments of one save that hold parts of a tensor each
    are taken together.  What doesn't match keeps its value and is reported.

    Raises:
        MismatchError: with `strict`, some leaf of the state has no match;
            nothing has been changed.
    """
    alone = isinstance(sources, str | os.PathLike | Checkpoint) or _is_pair(sources)
    every: Any = [sources] if alone else sources
    opened = _merge_parts([_open(source) for source in every])
    flat = flatten(state)
    found = [match(flat, one.manifest, rename=rename, whole_objects=False) for one in opened]
    report = _report(flat, found, [one.label for one in opened])
    if strict and report.unmatched:
        raise MismatchError(
            "warm_start: some leaves of the state have no match",
            mismatched=[f"{name}: {reason}" for name, reason in report.unmatched.items()],
        )
    resources = Resources(memory)
    placed: dict[Path, Any] = {}
    for one, result in zip(opened, found, strict=True):
        result.leaves = placed | result.leaves  # what an earlier source put there stays
        placed = fill_match(state, flat, result, one.manifest, one.store, resources)
    return report


def _report(flat: Flat, found: Sequence[Match], labels: Sequence[str]) -> Report:
    matched: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for result, label in zip(found, labels, strict=True):
        matched |= dict.fromkeys(result.matched, label)
        reasons |= {name: f"{label}: {why}" for name, why in result.mismatched.items()}
    names = flat.names
    unmatched = {
        name: reasons.get(name, "no source has it") for name in names if name not in matched
    }
    used = {*matched, *unmatched}
    unused = {name: None for result in found for name in result.unexpected if name not in used}
    return Report(matched, unmatched, tuple(unused))


def _is_pair(source: object) -> bool:
    return isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], int)


def _open(source: Any) -> _Opened:
    if isinstance(source, Checkpoint):
        source = (source.root, source.step)
    if isinstance(source, tuple):
        root, step = source
        store = LocalStore(root)
        return _Opened(f"{root} step {step}", store, open_step(store, step))
    path = FilePath(source)
    if path.is_dir():
        store = LocalStore(path)
        manifest = open_step(store)
        return _Opened(f"{path} step {manifest.step}", store, manifest)
    if not path.is_file():
        raise NotFoundError(f"{path}: neither a root, nor a manifest, nor a segment")
    store, step = LocalStore(path.parent), layout.manifest_step(path.name)
    if step is not None:
        return _Opened(str(path), store, open_step(store, step))
    step, tensors = read_index(store, path.name)
    return _Opened(str(path), store, _manifest_of(step, tensors))


def _manifest_of(step: int, tensors: Sequence[TensorEntry]) -> Manifest:
    """Tensors by name, as a flat dict: all that a segment knows of a state's structure."""
    rows = [[entry.spec.name, {"tensor": at}] for at, entry in enumerate(tensors)]
    return Manifest(step, {"dict": rows}, tuple(tensors))


def _merge_parts(opened: Sequence[_Opened]) -> list[_Opened]:
    """Take segments that follow each other and belong to one save as one source."""
    merged: list[_Opened] = []
    for one in opened:
        before = merged[-1] if merged else None
        if (
            before is None
            or _save_of(before.label) is None
            or (_save_of(before.label) != _save_of(one.label))
        ):
            merged.append(one)
            continue
        tensors = _joined(before.manifest.tensors, one.manifest.tensors)
        manifest = _manifest_of(one.manifest.step, tensors)
        merged[-1] = _Opened(one.label, one.store, manifest)
    return merged


def _save_of(label: str) -> str | None:
    """Folder, step and token of a segment's path; None for any other source."""
    path = FilePath(label)
    if layout.segment_step(path.name) is None:
        return None
    return str(path.parent / ".".join(path.name.split(".")[:2]))


def _joined(one: Iterable[TensorEntry], other: Iterable[TensorEntry]) -> list[TensorEntry]:
    rows: dict[str, list[TensorEntry]] = {}
    for entry in (*one, *other):
        rows.setdefault(entry.spec.name, []).append(entry)
    joined = []
    for entries in rows.values():
        chunks = {chunk.start: chunk for entry in entries for chunk in entry.chunks}
        ordered = tuple(chunks[start] for start in sorted(chunks))
        joined.append(TensorEntry(entries[0].spec, ordered, entries[0].version))
    return joined
