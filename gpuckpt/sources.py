"""Places that tensors can be read from: roots, steps, manifests, and single data files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gpuckpt import layout
from gpuckpt.commit import open_step
from gpuckpt.errors import NotFoundError
from gpuckpt.manifest import Manifest
from gpuckpt.pending import Checkpoint
from gpuckpt.seal import Seal
from gpuckpt.segments import read_index
from gpuckpt.shards import Shards
from gpuckpt.stores import Store
from gpuckpt.stores.opening import is_local, is_url, local_path, open_store, split
from gpuckpt.tensors import TensorEntry
from gpuckpt.values import Json

Source = str | os.PathLike[str] | Checkpoint | tuple[str | os.PathLike[str], int]


@dataclass(frozen=True, slots=True)
class Opened:
    """A source's manifest (for a segment, made of its index), and the store that has its data.

    Of shards that are another source's, `elsewhere` has that one's store by their labels.
    """

    label: str
    store: Store
    manifest: Manifest
    elsewhere: Mapping[str, Store] = field(default_factory=dict)


def open_sources(sources: Source | Sequence[Source], seal: Seal | None = None) -> list[Opened]:
    """Open one source or several; segments of one save that follow each other become one.

    One that has some shards of a tensor is given what it lacks by those before it.
    """
    alone = isinstance(sources, str | os.PathLike | Checkpoint) or _is_pair(sources)
    every: Any = [sources] if alone else sources
    return _share_shards(_merge_parts([open_source(source, seal) for source in every]))


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
    names: dict[str, dict[int | None, int]] = {}
    for at, entry in enumerate(tensors):
        names.setdefault(entry.spec.name, {}).setdefault(entry.spec.rank, at)
    rows = [[name, node_of(ranks)] for name, ranks in names.items()]
    return Manifest(step, {"dict": rows}, tuple(tensors))


def node_of(numbers: Mapping[int | None, int]) -> Json:
    """A structure's node of the tensors of one name: one, or one of each rank's own."""
    if None in numbers:
        return {"tensor": numbers[None]}
    return {"ranks": [[rank, {"tensor": number}] for rank, number in numbers.items()]}


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


def _share_shards(opened: Sequence[Opened]) -> list[Opened]:
    """Each source with those shards of the ones before it that it needs for whole tensors."""
    found: list[Opened] = []
    for at, one in enumerate(opened):
        before = opened[:at][::-1]  # later ones win
        rows, elsewhere, labels = _lent(one, before)
        if rows:
            manifest = replace(one.manifest, tensors=(*one.manifest.tensors, *rows))
            label = ", ".join([*labels, one.label])
            one = Opened(label, one.store, manifest, elsewhere)  # noqa: PLW2901
        found.append(one)
    return found


def _lent(
    one: Opened, others: Sequence[Opened]
) -> tuple[list[TensorEntry], dict[str, Store], list[str]]:
    """Rows of tensors of which a source has some shards only, whose they are, and their names."""
    rows: dict[str, TensorEntry] = {}
    elsewhere: dict[str, Store] = {}
    labels: dict[str, None] = {}
    shards = Shards(one.manifest)
    own = {entry.spec.label for entry in one.manifest.tensors}
    lacking = {
        entry.spec.tensor: entry.spec
        for at, entry in enumerate(one.manifest.tensors)
        if entry.spec.offset is not None and shards.lack(at, shards.spec(at).box)
    }
    for other in others if lacking else ():
        for entry in other.manifest.tensors:
            mine, label = lacking.get(entry.spec.tensor), entry.spec.label
            if mine is None or (mine.dtype, mine.whole) != (entry.spec.dtype, entry.spec.whole):
                continue
            if label not in own and label not in rows:
                rows[label], elsewhere[label] = entry, other.store
                labels[other.label] = None
    return list(rows.values()), elsewhere, [*reversed(labels)]


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
