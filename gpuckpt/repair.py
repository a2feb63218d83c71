"""Salvage a damaged checkpoint: what is intact of it becomes a checkpoint of another root."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath

from gpuckpt import layout
from gpuckpt._version import __version__
from gpuckpt.commit import commit, steps
from gpuckpt.errors import CorruptError, InvalidError, NotFoundError
from gpuckpt.fingerprint import checksum
from gpuckpt.manifest import Manifest
from gpuckpt.resources import Resources
from gpuckpt.salvage import Loss, Survey, survey
from gpuckpt.seal import Seal
from gpuckpt.segments import Writer
from gpuckpt.sources import node_of
from gpuckpt.spec import ChunkEntry, Extent
from gpuckpt.stores import Store
from gpuckpt.stores.opening import is_local, is_url, local_path
from gpuckpt.tensors import TensorEntry, by_tensor
from gpuckpt.values import Json
from gpuckpt.verify import verify_step

# Told of what is done ("reading", "copying", "verifying") and how many bytes of it.
Progress = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class Repaired:
    """What came of it: the checkpoint that was written, what is lost, and what was filled.

    `filled` are lost tensors that have an older step's value, by their names.
    """

    found: Survey
    written: Manifest
    filled: Mapping[str, int]

    @property
    def lost(self) -> list[Loss]:
        """The tensors that the new checkpoint lacks."""
        return [one for one in self.found.losses if one.entry.spec.label not in self.filled]

    @property
    def is_whole(self) -> bool:
        """Whether the new checkpoint is the old one, bit for bit."""
        return not self.found.losses and not self.found.unread


def repair(
    store: Store,
    step: int,
    target: Store,
    *,
    fill: bool = False,
    memory: int | str = "256 MiB",
    progress: Progress = lambda _, __: None,
    seal: Seal | None = None,
) -> Repaired:
    """Write what is intact of a step of `store` to `target`, as the same step, and verify it.

    `store` isn't changed.  With `fill`, a lost tensor gets its value of the
    newest older step that has it intact; without a manifest the plain values,
    too, are those of the newest older step.  With a `seal`, only what is sealed
    with its key is intact, and the new checkpoint is sealed as well.

    Raises:
        NotFoundError: nothing of the step is intact.
        InvalidError: `target` has the step already.
        CorruptError: the new checkpoint can't be read back.
    """
    resources = Resources(memory)
    if step in steps(target):
        raise InvalidError(f"{target.root} has a step {step} already; give another directory")
    found = survey(store, step, resources, lambda nbytes: progress("reading", nbytes), seal)
    older = {one.entry.spec.label: one.older for one in found.losses if fill and one.older}
    entries = _left_whole([*found.intact, *(replace(row) for _, row in older.values())], found)
    if not entries and (found.losses or found.unread):
        why = found.unread or f"all of its {len(found.losses)} tensors are damaged"
        raise NotFoundError(f"{store.root}, step {step}: nothing can be salvaged: {why}")
    structure, rows = _structure(found, entries, fill=fill)
    with target.lock():
        written = _write(
            *(store, target, found, structure, rows),
            progress=lambda nbytes: progress("copying", nbytes),
            seal=seal,
        )
    damage = verify_step(
        target, step, resources, lambda nbytes: progress("verifying", nbytes), seal
    )
    if damage:
        raise CorruptError(f"{target.root}/{damage[0].file}", damage[0].reason)
    return Repaired(found, written, {name: at for name, (at, _) in older.items()})


def check_apart(root: str | os.PathLike[str], to: str | os.PathLike[str]) -> None:
    """See that what is written can't touch what is read.

    Raises:
        InvalidError: one directory is, or is in, the other.
    """
    one, other = _place(root), _place(to)
    if other == one or one in other.parents:
        raise InvalidError(f"{to} is in {root}, which isn't changed; give a directory elsewhere")


def _place(root: str | os.PathLike[str]) -> PurePath:
    """What of two roots tells whether one is in the other."""
    if not is_url(root):
        return Path(root).expanduser().resolve()
    if is_local(str(root)):
        return local_path(str(root)).resolve()
    return PurePosixPath(str(root).partition("?")[0].lower())


def _left_whole(entries: Sequence[TensorEntry], found: Survey) -> list[TensorEntry]:
    """Those of tensors of which no shard is lost: of others no array could be made."""
    there = {entry.spec.label for entry in entries}
    lost = {loss.entry.spec.tensor for loss in found.losses if loss.entry.spec.label not in there}
    return [entry for entry in entries if entry.spec.tensor not in lost]


def _structure(
    found: Survey, entries: Sequence[TensorEntry], *, fill: bool
) -> tuple[Json, list[TensorEntry]]:
    """The state's tree without what is lost, and its tensors in the order of their numbers.

    Of several tensors in a list, None stands in a lost one's place: the others keep theirs.
    """
    whole = found.manifest
    if fill and found.template is not None:
        whole = found.template
    groups = by_tensor(entries)
    keys = dict.fromkeys(entry.spec.tensor for entry in whole.tensors)
    order = [key for key in keys if key in groups]
    beside = sorted(groups.keys() - keys.keys(), key=str)  # the template doesn't have them
    rows: list[TensorEntry] = []
    numbers: dict[tuple[str, int | None], int] = {}
    for key in (*order, *beside):
        numbers[key] = len(rows)
        rows += groups[key]
    tensors = enumerate(entry.spec.tensor for entry in whole.tensors)
    structure = _pruned(whole.structure, {at: numbers[k] for at, k in tensors if k in numbers})
    if beside and "dict" in structure:
        names: dict[str, dict[int | None, int]] = {}
        for name, rank in beside:
            names.setdefault(name, {})[rank] = numbers[name, rank]
        structure["dict"] += [[name, node_of(ranks)] for name, ranks in names.items()]
    return structure, rows


def _pruned(node: Json, positions: Mapping[int, int]) -> Json:
    """A node with its tensors' new numbers; a lost one becomes None, or goes from its mapping."""
    ((kind, payload),) = node.items()
    if kind == "tensor":
        return {"tensor": positions[payload]} if payload in positions else {"value": None}
    if kind == "object":
        return {"object": _pruned(payload, positions)}
    if kind == "dict":
        kept = [pair for pair in payload if not _is_lost(pair[1], positions)]
        return {"dict": [[key, _pruned(child, positions)] for key, child in kept]}
    if kind == "ranks":
        there = [pair for pair in payload if not _is_lost(pair[1], positions)]
        return {kind: [[rank, _pruned(child, positions)] for rank, child in there]}
    if kind in ("list", "tuple"):
        return {kind: [_pruned(child, positions) for child in payload]}
    return node


def _is_lost(node: Json, positions: Mapping[int, int]) -> bool:
    return "tensor" in node and node["tensor"] not in positions


def _write(
    store: Store,
    target: Store,
    found: Survey,
    structure: Json,
    entries: list[TensorEntry],
    *,
    progress: Callable[[int], None],
    seal: Seal | None,
) -> Manifest:
    old = found.manifest
    token = secrets.token_hex(4)
    writer = Writer(
        target,
        lambda part: layout.segment_name(old.step, token, 0, part),
        segment_nbytes=layout.SEGMENT_NBYTES,
    )
    copier = _Copier(store, writer, progress)
    try:
        copied = tuple(
            replace(entry, chunks=tuple(map(copier.chunk, entry.chunks))) for entry in entries
        )
        writer.finish(copied, old.step, seal=seal)
    except BaseException:
        writer.abandon()
        raise
    manifest = Manifest(
        *(old.step, structure, copied),
        epoch=old.epoch,
        metrics=old.metrics,
        created=old.created or time.time(),
        writer=f"gpuckpt {__version__} (repaired)",
    )  # all in one, whatever the number of ranks that wrote it
    commit(target, manifest, abandon=writer.abandon, seal=seal)
    return manifest


class _Copier:
    """Copies chunks as they are encoded, each once, with the chunks that they need."""

    def __init__(self, store: Store, writer: Writer, progress: Callable[[int], None]) -> None:
        self._store, self._writer, self._progress = store, writer, progress
        self._copied: dict[Extent, Extent] = {}

    def chunk(self, chunk: ChunkEntry) -> ChunkEntry:
        """A chunk's row in the new root."""
        base = None if chunk.base is None else self.chunk(chunk.base)
        sources = tuple(map(self.chunk, chunk.sources))
        if sources:
            first = sources[0].extent
            extent = Extent(first.segment, first.offset, 0)
        else:
            extent = self._extent(chunk)
        return replace(chunk, extent=extent, base=base, sources=sources)

    def _extent(self, chunk: ChunkEntry) -> Extent:
        old = chunk.extent
        if old not in self._copied:
            data = bytearray(old.length)
            self._store.read_into(old.segment, old.offset, memoryview(data))
            if checksum([memoryview(data)]) != chunk.checksum:
                raise CorruptError(f"{self._store.root}/{old}", "it can't be read the same twice")
            (self._copied[old],) = self._writer.write([[memoryview(data)]])
            self._progress(old.length)
        return self._copied[old]
