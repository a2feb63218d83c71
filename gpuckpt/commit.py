"""Commit a checkpoint, open one, and sweep away what no checkpoint names.

Commit:

1. Sync each segment.            A manifest must never point at bytes that a crash can take away.
   (`segments.Writer.finish` has done it: the file that was written is the one to sync.)
2. Sync the names.               …nor at a file whose name is lost.
3. Write and sync the manifest   The next step must publish whole contents.
   under a temporary name.
4. Rename it to its own name.    The commit point: before it the old checkpoint is the newest,
                                 after it the new one.
5. Sync the names.               Only now may `commit` return: returning promises durability.

A store that has no rename has no page cache, either, nor directories to sync:
what it said it has is durable, name and all.  There steps 3 to 5 are one:

3. See that the lock is ours     A manifest's put is the commit point, and whole or not at all.
   still, and put the manifest.

Delete:

1. Remove the manifests.         From here on nothing names the data any more.
2. Sync the names.               A manifest that came back after a crash must find its segments.
3. Remove the segments that no manifest names.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import cast

from gpuckpt import layout
from gpuckpt.errors import CheckpointError, CorruptError, NotFoundError, StorageError
from gpuckpt.manifest import Manifest, pack_manifest, unpack_files, unpack_manifest
from gpuckpt.parts import read_own, read_parts
from gpuckpt.seal import Seal
from gpuckpt.stores import Publishes, Renames, Store, read_all, remove_all, write_all

log = logging.getLogger("gpuckpt")


def commit(
    store: Store, manifest: Manifest, *, abandon: Callable[[], object], seal: Seal | None = None
) -> None:
    """Make `manifest`, whose segments are durable, visible and durable; `seal` seals it.

    If that fails before the rename, `abandon` is called to delete the segments.
    From the rename on they stay: a storage that reports an error may have made
    it all the same.  What then isn't named is swept away later; what is, is a
    whole checkpoint, of which only nothing promises that it outlives a loss of
    power.
    """
    publish(store, manifest.step, lambda: pack_manifest(manifest, seal), abandon=abandon)


def publish(
    store: Store, step: int, pack: Callable[[], bytes], *, abandon: Callable[[], object]
) -> None:
    """As `commit`, of a manifest whose bytes `pack` gives."""
    name = layout.manifest_name(step)
    if hasattr(store, "publish"):  # `isinstance` of a protocol takes long
        _publish(cast(Publishes, store), name, pack, abandon=abandon)
        return
    temporary = name + layout.TEMPORARY
    try:
        store.sync_names()  # 2
        write_all(store, temporary, pack())  # 3
    except BaseException:
        with contextlib.suppress(CheckpointError):
            store.remove(temporary)
        abandon()
        raise
    try:
        cast(Renames, store).rename(temporary, name)  # 4
        store.sync_names()  # 5
    except CheckpointError as error:
        # Without `errno`: whoever would make room and try again can't know what is there.
        raise StorageError(f"{error}; it may be there all the same, or after a reboot") from error


def _publish(
    store: Publishes, name: str, pack: Callable[[], bytes], *, abandon: Callable[[], object]
) -> None:
    """Put a manifest in one step; the segments stay if it may have come to be."""
    sent = False
    try:
        data = pack()
        sent = True
        store.publish(name, data)  # 3
    except BaseException as error:
        if not sent or (isinstance(error, CheckpointError) and not getattr(error, "maybe", False)):
            abandon()
        raise


def open_step(
    store: Store,
    step: int | None = None,
    seal: Seal | None = None,
    *,
    parts: bool = True,
    of: tuple[int, int] | None = None,
) -> Manifest:
    """The manifest of a committed step, the newest unless named: undoes `commit`.

    Without `parts`, of a checkpoint of several ranks it lists no tensors; with
    a rank and their number (`of`) those of its own part, if they may do (`read_own`).

    Raises:
        NotFoundError: there is no such step, or none at all.
        CorruptError: its manifest isn't what was written.
        AuthenticationError: it isn't sealed with the key of `seal`, if there is one.
    """
    for last in (False, False, True):
        try:
            manifest = _open(store, _choose(store, step), seal)
            return _with_parts(store, manifest, seal, of) if parts else manifest
        except (NotFoundError, CorruptError):
            # A writer may have deleted or replaced it just then: look again.
            if last:
                raise
    raise AssertionError


def _choose(store: Store, step: int | None) -> int:
    found = steps(store)
    if step is None:
        if not found:
            raise NotFoundError(f"{store.root}: there is no committed checkpoint")
        return found[-1]
    if step not in found:
        near = ", ".join(map(str, found[-10:])) or "none"
        raise NotFoundError(f"{store.root}: step {step} isn't there; committed steps: {near}")
    return step


def _open(store: Store, step: int, seal: Seal | None) -> Manifest:
    name = layout.manifest_name(step)
    where = f"{store.root}/{name}"
    manifest = unpack_manifest(_read_manifest(store, name), where, seal)
    if manifest.step != step or manifest.rank is not None:
        raise CorruptError(where, f"it is the manifest of step {manifest.step}")
    return manifest


def _with_parts(
    store: Store, manifest: Manifest, seal: Seal | None, of: tuple[int, int] | None
) -> Manifest:
    found = read_parts(store, manifest, seal) if of is None else read_own(store, manifest, of, seal)
    name = layout.manifest_name(manifest.step)
    if found.absent and not _is_same(store, name, manifest, seal):
        where = f"{store.root}/{name}"
        raise NotFoundError(f"{where} was deleted or replaced while its parts were read")
    return found


def _is_same(store: Store, name: str, manifest: Manifest, seal: Seal | None) -> bool:
    """Whether a manifest is still there, of the same parts."""
    again = unpack_manifest(_read_manifest(store, name), f"{store.root}/{name}", seal)
    return again.parts == manifest.parts


def steps(store: Store) -> list[int]:
    """All committed steps, ascending."""
    found = (layout.manifest_step(name) for name in store.names())
    return sorted(step for step in found if step is not None)


def delete(
    store: Store,
    doomed: Iterable[int],
    known: Manifest | None = None,
    spared: Collection[str] = (),
    among: Collection[str] | None = None,
) -> None:
    """Delete committed steps, and then what only they named; `known` is committed and stays.

    And so do the segments that are to be `spared`, and what isn't `among` these.
    """
    names = [layout.manifest_name(step) for step in doomed]
    remove_all(store, names)  # 1
    if names:
        sweep(store, known=known, spared=spared, among=among)  # 2, 3


def sweep(
    store: Store,
    *,
    committed: Manifest | None = None,
    known: Manifest | None = None,
    durable: bool = False,
    spared: Collection[str] = (),
    among: Collection[str] | None = None,
) -> list[str]:
    """Remove what no committed manifest names, and return the names of what was removed.

    Call it only while holding the store's lock and with no save under way; or
    of files `among` those that were there when none was.
    If any manifest can't be read, no segment is removed: it may name it.

    After a commit, give its manifest: then the names are durable already, and
    only if there are segments of its step that it doesn't name, or of a step
    that isn't committed, are other manifests read.  Else, unless the names are
    `durable`, they are synced first: a manifest that is gone, or replaced, only
    in memory would be back after a crash, and must find its segments.  One that
    is `known` isn't read.  Segments that are to be `spared` stay in any case.
    """
    known = known or committed
    names = store.names() if among is None else among
    doomed = [name for name in names if name.endswith(layout.TEMPORARY) and _ours(name)]
    segments = {name: layout.data_step(name) for name in names}
    segments = {name: step for name, step in segments.items() if step is not None}
    if committed is not None:
        settled = set(steps(store)) - {committed.step}
        own = set(committed.files)
        segments = {n: s for n, s in segments.items() if n not in own and s not in settled}
    if segments:
        with contextlib.suppress(CheckpointError):
            kept = {name for step in steps(store) for name in named_files(store, step, known)}
            doomed += [name for name in segments if name not in kept and name not in spared]
    if doomed and committed is None and not durable:
        store.sync_names()
    remove_all(store, doomed)
    return doomed


def named_files(store: Store, step: int, known: Manifest | None = None) -> list[str]:
    """The segments and parts that a committed step names; one that is `known` isn't read.

    Raises:
        CheckpointError: its manifest isn't there, or isn't what was written.
    """
    if known is not None and known.step == step:
        return known.files
    name = layout.manifest_name(step)
    return unpack_files(_read_manifest(store, name), f"{store.root}/{name}")


def _read_manifest(store: Store, name: str) -> bytes:
    nbytes = store.size(name)
    if nbytes > layout.MANIFEST_NBYTES_MAX:
        raise CorruptError(f"{store.root}/{name}", f"{nbytes} bytes are no manifest's")
    return read_all(store, name, nbytes)


@contextlib.contextmanager
def writing(store: Store) -> Iterator[None]:
    """Hold the store for writing, swept of what a crash may have left there.

    A writer that was killed may have left a manifest visible that isn't
    durable.  Whoever goes on from it does so for good, so its name is synced.

    Raises:
        LockedError: somebody else holds it.
    """
    with store.lock():
        store.sync_names()
        if removed := sweep(store, durable=True):
            log.info("swept away %d files that no checkpoint names", len(removed))
        for name in filter(layout.is_marker, store.names()):
            store.remove(name)  # of a rank that died while it entered
        yield


def _ours(name: str) -> bool:
    name = name.removesuffix(layout.TEMPORARY)
    return layout.manifest_step(name) is not None or layout.segment_step(name) is not None
