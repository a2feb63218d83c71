"""Take the newest intact step before the one that was asked for, if that is damaged.

A restore writes into the state while it checks, since a second copy of the
state would take as much memory again.  So when it finds damage, the state
holds parts of that step; an older one is taken only if it fills every array
that may have been written to, so that in the end the state is one step's.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from gpuckpt.arrays import Tensor
from gpuckpt.commit import open_step, steps
from gpuckpt.errors import CheckpointError, CorruptError, MismatchError, NotFoundError, StorageError
from gpuckpt.loading import fill_match
from gpuckpt.manifest import Manifest, pack_manifest
from gpuckpt.matching import Match, Rename, is_enough, match
from gpuckpt.parts import read_parts
from gpuckpt.resources import Resources
from gpuckpt.seal import Seal
from gpuckpt.stores import Store
from gpuckpt.tree import Flat, flatten

log = logging.getLogger("gpuckpt")

T = TypeVar("T")

# Errors of this file alone; others, like too many open files, say nothing of it.
UNREADABLE = frozenset(
    (errno.EIO, errno.EBADMSG, errno.ENODATA, errno.EUCLEAN, errno.EACCES, errno.ESTALE)
)


@dataclass(frozen=True, slots=True)
class Taken(Generic[T]):
    """The step that was taken, what came of it, and what to tell of one that was damaged."""

    manifest: Manifest
    result: T
    remarks: tuple[str, ...] = ()


def is_elsewhere(error: BaseException, store: Store, manifest: Manifest | None) -> bool:
    """Whether a step doesn't fit since ranks' parts of it aren't here."""
    if not isinstance(error, MismatchError) or manifest is None:
        return False
    names = {part.name for part in manifest.parts} if manifest.partial else set()
    return bool(manifest.absent) or not names <= set(store.names())


def is_damage(error: CheckpointError, store: Store, manifest: Manifest | None) -> bool:
    """Whether an error says that files of a step aren't there any more as they were written."""
    if isinstance(error, CorruptError):
        return True
    if is_elsewhere(error, store, manifest):
        return True
    if isinstance(error, NotFoundError):
        return manifest is not None and not set(manifest.files) <= set(store.names())
    return isinstance(error, StorageError) and error.errno in UNREADABLE


def take_step(
    store: Store,
    step: int | None,
    take: Callable[[Manifest], T],
    *,
    fallback: bool,
    seal: Seal | None = None,
    of: tuple[int, int] | None = None,
) -> Taken[T]:
    """What `take` makes of a committed step, the newest unless named.

    With `of`, a rank and how many there are, it may be given a manifest of what
    this rank wrote (`parts.read_own`).

    With `fallback`, if that one is damaged, of the newest before it of which
    `take` can make something.  One that a writer replaces meanwhile, or that
    isn't the newest any more, is looked for again.  What isn't sealed with the
    key of `seal`, if there is one, is no damage: nobody falls back from that.

    Raises:
        CorruptError: it is damaged, and so are, with `fallback`, all before it.
        CheckpointError: what else `take` raises, or opening the step.
    """
    while True:
        asked = step if step is not None else max(steps(store), default=0)
        manifest: Manifest | None = None
        try:
            manifest = open_step(store, step, seal, of=of)
            return Taken(manifest, take(manifest))
        except CheckpointError as error:
            if manifest is not None and _is_replaced(error, store, step, manifest, seal):
                continue
            if not is_damage(error, store, manifest):
                raise
            if not fallback:
                _note_remedy(error)
                raise
            failure = error
        return _take_older(store, asked, take, failure, seal)


def _is_replaced(
    error: CheckpointError,
    store: Store,
    step: int | None,
    manifest: Manifest,
    seal: Seal | None,
) -> bool:
    """Whether a writer has deleted or replaced the step that was being read.

    Compared as bytes: a manifest with a NaN in it equals none, not even itself.
    """
    if not isinstance(error, NotFoundError | CorruptError):
        return False
    return pack_manifest(open_step(store, step, seal, parts=False)) != pack_manifest(manifest)


def _take_older(
    store: Store,
    asked: int,
    take: Callable[[Manifest], T],
    failure: CheckpointError,
    seal: Seal | None,
) -> Taken[T]:
    tried = []
    for older in reversed([step for step in steps(store) if step < asked]):
        try:
            manifest = open_step(store, older, seal)
            remark = passed_over(asked, _reason(failure), older)
            taken = Taken(manifest, take(manifest), (remark,))
        except CheckpointError as error:
            log.warning("step %d isn't taken either: %s", older, error)
            tried.append(f"step {older}: {_reason(error)}")
            continue
        log.warning("%s", taken.remarks[0])
        return taken
    others = "; ".join(tried) or "there is none before it"
    raise CorruptError(
        f"{store.root}, step {asked}",
        f"{_reason(failure)}; and no older step could be taken: {others}",
        remedy="`gpuckpt repair` salvages the tensors that are intact",
    ) from failure


def passed_over(asked: int, reason: str, taken: int, what: str = "is damaged") -> str:
    """What to tell of a step in whose place an older one was taken."""
    return f"step {asked} {what}, and step {taken} was taken in its place: {reason}"


def _reason(error: CheckpointError) -> str:
    return f"{error.where}: {error.reason}" if isinstance(error, CorruptError) else str(error)


def _note_remedy(error: CheckpointError) -> None:
    """Errors of damage name their remedies themselves."""
    if not isinstance(error, CorruptError):
        error.add_note(
            "fallback=True takes the newest intact step before it; `gpuckpt repair` salvages "
            "what is intact of this one"
        )


class Restoration:
    """Restores steps into one state, one after the other until one is intact."""

    def __init__(
        self,
        state: Any,
        resources: Resources,
        *,
        names: Iterable[str] | None,
        rename: Rename,
        strict: bool,
        rank: int = 0,
        seal: Seal | None = None,
    ) -> None:
        """`seal` is of parts that are to be read once it is known that they must be."""
        self._state, self._resources = state, resources
        self._names = names if names is None or isinstance(names, str) else list(names)
        self._rename, self._strict, self._rank = rename, strict, rank
        self._seal = seal
        self._flat: Flat | None = None
        self._touched: list[Tensor] = []
        """What a damaged step may have been written to."""

    def take(self, store: Store, manifest: Manifest) -> Match:
        """Restore a step; every array that an attempt before may have touched is overwritten.

        Raises:
            MismatchError: it doesn't fit the state, or leaves a touched array as it is; nothing
                more has been changed.
            CorruptError: it is damaged; it may have been restored in part.
        """
        # Once: objects may answer with other arrays each time.
        flat = self._flat = self._flat or flatten(self._state)
        found = self._match(flat, manifest)
        if manifest.partial and not is_enough(found):
            manifest = read_parts(store, manifest, self._seal)
            found = self._match(flat, manifest)
        subject = f"{store.root}, step {manifest.step} doesn't fit the state"
        if self._strict:
            found.raise_if_not_exact(subject)
        filled = [target for every in found.filled.values() for target in every]
        left = _others(self._touched, filled)
        if left:
            raise MismatchError(
                subject,
                missing=left,
                hint="they hold parts of a newer step, which is damaged; restore others by names=",
            )
        self._touched += filled
        _tell_kept(found.kept, manifest.step, self._rank)
        fill_match(self._state, flat, found, manifest, store, self._resources)
        return found

    def _match(self, flat: Flat, manifest: Manifest) -> Match:
        return match(flat, manifest, names=self._names, rename=self._rename, rank=self._rank)


def _others(tensors: Sequence[Tensor], filled: Sequence[Tensor]) -> list[str]:
    """The names of those tensors, each once, which are none of those that are filled."""
    if not tensors:  # mostly
        return []
    known = {one.where for one in filled}
    return list({one.where: one.spec.name for one in tensors if one.where not in known}.values())


def _tell_kept(names: Sequence[str], step: int, rank: int) -> None:
    if names:
        log.warning(
            *("step %d has nothing of rank %d's own; kept as they are: %s", step, rank),
            ", ".join(names),
        )
