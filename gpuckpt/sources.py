"""Places that tensors can be read from: roots, steps, manifests, and single data files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuckpt import layout
from gpuckpt.commit import open_step
from gpuckpt.errors import NotFoundError
from gpuckpt.manifest import Manifest
from gpuckpt.pending import Checkpoint
from gpuckpt.seal import Seal
from gpuckpt.segments import read_index
from gpuckpt.stores import Store
from gpuckpt.stores.opening import is_local, is_url, local_path, open_store, split
from gpuckpt.tensors import TensorEntry

Source = str | os.PathLike[str] | Checkpoint | tuple[str | os.PathLike[str], int]


@dataclass(frozen=True, slots=True)
class Opened:
    """A source's manifest (for a segment, made of its index), and the store that has its data."""

    label: str
    store: Store
    manifest: Manifest


def open_sources(sources: Source | Sequence[Source], seal: Seal | None = None) -> list[Opened]:
    """Open one source or several; segments of one save that follow each other become one."""
    alone = isinstance(sources, str | os.PathLike | Checkpoint) or _is_pair(sources)
    every: Any = [sources] if alone else sources
    return _merge_parts([open_source(source, seal) for source in every])


def _is_pair(source: object) -> bool:
    return isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], int)


def open_source(source: Any, seal: Seal | None = None) -> Opened:
    """Open one source; a link to a file stands for that file.

    Raises:
        NotFoundError: there is nothing of the kind at that place.
        FormatError: a file that is no segment.
        AuthenticationError: it isn't sealed with the key of `seal`, if there is one.
    """
    if isinstance(source, Checkpoint):
        source = (source.root, source.step)
    if isinstance(source, tuple):
        root, step = source
        store = open_store(root)
        return Opened(f"{root} step {step}", store, open_step(store, step, seal))
    if is_url(source) and not is_local(source):
        root, name = split(source)
        return _open_file(source, root, name, seal) if is_file(source) else _newest(source, seal)
    path = local_path(source) if is_url(source) else Path(source)
    if path.is_dir():
        return _newest(path, seal)
    if not path.is_file():
        raise NotFoundError(f"{path}: neither a root, nor a manifest, nor a segment")
    path = path.resolve() if path.is_symlink() else path
    return _open_file(str(path), path.parent, path.name, seal)


def is_file(source: str | os.PathLike[str]) -> bool:
    """Whether a place is that of one file, and not of a root; of a URL its name tells."""
    if not is_url(source):
        return Path(source).is_file()
    if is_local(str(source)):
        return local_path(str(source)).is_file()
    _, name = split(str(source))
    return layout.manifest_step(name) is not None or layout.segment_step(name) is not None


def _newest(root: str | os.PathLike[str], seal: Seal | None) -> Opened:
    store = open_store(root)
    manifest = open_step(store, seal=seal)
    return Opened(f"{root} step {manifest.step}", store, manifest)


def _open_file(label: str, root: str | os.PathLike[str], name: str, seal: Seal | None) -> Opened:
    """A manifest, or a segment alone."""
    store, step = open_store(root), layout.manifest_step(name)
    if step is not None:
        return Opened(label, store, open_step(store, step, seal))
    step, tensors = read_index(store, name, seal)
    return Opened(label, store, manifest_of(step, tensors))


def manifest_of(step: int, tensors: Sequence[TensorEntry]) -> Manifest:
    """Tensors by name, as a flat dict: all that a segment knows of a state's structure."""
    rows = [[entry.spec.label, {"tensor": at}] for at, entry in enumerate(tensors)]
    return Manifest(step, {"dict": rows}, tuple(tensors))


def _merge_parts(opened: Sequence[Opened]) -> list[Opened]:
    """Take segments that follow each other and belong to one save as one source."""
    merged: list[Opened] = []
    for one in opened:
        before = merged[-1] if merged else None
        if (
            before is None
            or _save_of(before.label) is None
            or (_save_of(before.label) != _save_of(one.label))
        ):
            merged.append(one)
            continue
        tensors = joined(before.manifest.tensors, one.manifest.tensors)
        manifest = manifest_of(one.manifest.step, tensors)
        merged[-1] = Opened(one.label, one.store, manifest)
    return merged


def _save_of(label: str) -> str | None:
    """Folder, step and token of a segment's path; None for any other source."""
    path = Path(label)
    if layout.segment_step(path.name) is None:
        return None
    return str(path.parent / ".".join(path.name.split(".")[:2]))


def joined(one: Iterable[TensorEntry], other: Iterable[TensorEntry]) -> list[TensorEntry]:
    """Rows of two segments of one save, those of one tensor as one row."""
    rows: dict[str, list[TensorEntry]] = {}
    for entry in (*one, *other):
        rows.setdefault(entry.spec.label, []).append(entry)
    found = []
    for entries in rows.values():
        chunks = {chunk.start: chunk for entry in entries for chunk in entry.chunks}
        ordered = tuple(chunks[start] for start in sorted(chunks))
        found.append(TensorEntry(entries[0].spec, ordered, entries[0].version))
    return found
