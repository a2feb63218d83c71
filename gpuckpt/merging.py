"""Put a checkpoint together whose files lie in several directories, as each machine's own.

1. Each file that the manifest      From whichever directory has it; its bytes durable.
   names is copied.                 No manifest names it there yet.
2. Every chunk is read there,       What was damaged, before or on the way, is never visible
   and compared.                    as a checkpoint.
3. The manifest is published, as    Byte for byte as it was: a seal stays valid.
   by a save.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gpuckpt import layout
from gpuckpt.commit import open_step, publish, steps, writing
from gpuckpt.errors import CheckpointError, CorruptError, InvalidError, NotFoundError
from gpuckpt.manifest import Manifest
from gpuckpt.parts import read_parts
from gpuckpt.resources import Resources
from gpuckpt.seal import Key, Seal, make_seal
from gpuckpt.segments import read_index
from gpuckpt.stores import Store, read_all
from gpuckpt.stores.opening import open_store
from gpuckpt.verify import verify_chunks

Progress = Callable[[str, int], None]
Root = str | os.PathLike[str]

BUFFER_NBYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Merged:
    """What came of it: the step, how many ranks it is of, the files copied, and their bytes."""

    step: int
    ranks: int
    files: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Found:
    """A manifest, where it was read, and where each file that it names is."""

    manifest: Manifest
    store: Store
    places: dict[str, Store]

    @property
    def missing(self) -> list[str]:
        return [name for name in self.manifest.files if name not in self.places]


def merge(
    roots: Iterable[Root],
    to: Root,
    step: int | None = None,
    *,
    memory: int | str = "256 MiB",
    progress: Progress = lambda _, __: None,
    key: Key | None = None,
) -> Merged:
    """Copy one step out of several roots to `to`, where it is a checkpoint like any other.

    The newest step of which the roots together have every file, unless named.
    Blocks until it is durable; the roots aren't changed.  `progress` is told
    ("copying", "verifying") how many bytes are done.  With a `key`, only what
    is sealed with it is taken.

    Raises:
        NotFoundError: files of the step are in none of the roots; it names them.
        InvalidError: `to` is one of the roots, or has another checkpoint of this step.
        CorruptError: a file isn't what was saved; `to` has no such step.
        LockedError: somebody else writes to `to`.
    """
    seal, key = make_seal(key), None  # so that no traceback's locals have it
    stores, target = [open_store(root) for root in roots], open_store(to)
    if any(os.path.realpath(one.root) == os.path.realpath(target.root) for one in stores):
        raise InvalidError(f"merge: {target.root} is one of the roots; give another directory")
    return merge_stores(stores, target, step, Resources(memory), progress=progress, seal=seal)


def merge_stores(
    stores: Sequence[Store],
    target: Store,
    step: int | None,
    resources: Resources,
    *,
    progress: Progress = lambda _, __: None,
    seal: Seal | None = None,
) -> Merged:
    """As `merge`, of stores that are open."""
    found = _choose(stores, step, seal)
    with writing(target):
        if found.manifest.step in steps(target):
            _check_same(target, found.manifest)
            return Merged(found.manifest.step, found.manifest.ranks, (), 0)
        return _bring(found, target, resources, progress, seal)


def _choose(stores: Sequence[Store], step: int | None, seal: Seal | None) -> _Found:
    """The newest step that is whole, or the one asked for."""
    every = sorted({one for store in stores for one in steps(store)}, reverse=True)
    wanted = every if step is None else [one for one in every if one == step]
    files = [(name, store) for store in reversed(stores) for name in store.names()]
    told: list[str] = []
    for one in wanted:
        for found in _manifests(stores, one, dict(files), seal, told):
            if not found.missing:
                return found
            told.append(f"step {one}: {_named(found.missing)}")
    roots = ", ".join(store.root for store in stores)
    what = "; ".join(told) or ("no committed step" if step is None else f"no step {step}")
    raise NotFoundError(
        f"merge: {roots} have together no whole checkpoint: {what}; give all ranks' directories"
    )


def _manifests(
    stores: Sequence[Store],
    step: int,
    files: dict[str, Store],
    seal: Seal | None,
    told: list[str],
) -> Iterator[_Found]:
    """Each different manifest of a step; of those that can't be read it is `told` why."""
    seen: list[list[str]] = []
    for store in stores:
        if step not in steps(store):
            continue
        try:
            manifest = open_step(store, step, seal, parts=False)
        except CheckpointError as error:
            told.append(str(error))
            continue
        if manifest.files not in seen:
            seen.append(manifest.files)
            places = {name: files[name] for name in manifest.files if name in files}
            yield _Found(manifest, store, places)


def _named(missing: Sequence[str]) -> str:
    """The files that are missing, the ranks' parts first: whose they are says where to look."""
    parts = [name for name in missing if layout.part_step(name) is not None]
    chosen = [*parts, *(name for name in missing if name not in parts)]
    more = f" and {len(chosen) - 6} more" if len(chosen) > 6 else ""
    return f"{', '.join(chosen[:6])}{more} in none of them"


def _check_same(target: Store, manifest: Manifest) -> None:
    there = open_step(target, manifest.step, parts=False)
    if there.files != manifest.files:
        raise InvalidError(
            f"{target.root} has another checkpoint of step {manifest.step}; give another directory"
        )


def _bring(
    found: _Found, target: Store, resources: Resources, progress: Progress, seal: Seal | None
) -> Merged:
    manifest, there = found.manifest, set(target.names())
    name = layout.manifest_name(manifest.step)
    copied: list[str] = []
    nbytes = 0

    def abandon() -> None:
        for one in copied:
            with contextlib.suppress(CheckpointError):
                target.remove(one)

    try:
        for one, source in found.places.items():
            if one not in there:
                copied.append(one)
                nbytes += _copy(source, target, one, progress)
        _check(found, target, resources, progress, seal)
    except BaseException:
        abandon()
        raise
    publish(target, manifest.step, lambda: read_all(found.store, name), abandon=abandon)
    return Merged(manifest.step, manifest.ranks, tuple(copied), nbytes)


def _check(
    found: _Found, target: Store, resources: Resources, progress: Progress, seal: Seal | None
) -> None:
    """Compare all that is in the target now with what the parts and the segments say of it."""
    whole = read_parts(target, found.manifest, seal)
    for one in verify_chunks(target, whole, resources, lambda n: progress("verifying", n)):
        where = f"{found.places[one.file].root}/{one.file}"
        raise CorruptError(where, f"{one.tensor}: {one.reason}")
    for name in whole.segments:
        read_index(target, name, seal)


def _copy(source: Store, target: Store, name: str, progress: Progress) -> int:
    """Copy one file; its contents are durable on return."""
    nbytes, room = source.size(name), np.empty(BUFFER_NBYTES, np.uint8)
    file = target.create(name)
    try:
        for at in range(0, nbytes, BUFFER_NBYTES):
            part = room[: min(BUFFER_NBYTES, nbytes - at)].data
            source.read_into(name, at, part)
            file.append([part])
            progress("copying", part.nbytes)
        file.sync()
    finally:
        file.close()
    return nbytes
