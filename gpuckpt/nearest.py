"""Take a step from the nearest tier that has it whole."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from gpuckpt.commit import steps
from gpuckpt.errors import (
    AuthenticationError,
    CheckpointError,
    CorruptError,
    NotFoundError,
    StorageError,
)
from gpuckpt.fallback import Taken, is_damage, is_elsewhere, take_step
from gpuckpt.manifest import Manifest
from gpuckpt.seal import Seal
from gpuckpt.stores import Store

log = logging.getLogger("gpuckpt")

T = TypeVar("T")


def find_steps(stores: Sequence[Store]) -> tuple[dict[int, list[Store]], list[str]]:
    """Each committed step with the stores that have it, the nearest first; who can't say, in words.

    Raises:
        StorageError: one can't say, and no other has any: nobody knows that there is none.
    """
    found: dict[int, list[Store]] = {}
    failures: list[StorageError] = []
    for store in stores:
        try:
            for step in steps(store):
                found.setdefault(step, []).append(store)
        except StorageError as error:
            failures.append(error)
    if failures and not found:
        raise failures[0]
    return found, [f"another tier may have newer steps: {error}" for error in failures]


def take_nearest(
    stores: Sequence[Store],
    step: int | None,
    take: Callable[[Store, Manifest], T],
    *,
    fallback: bool,
    seal: Seal | None = None,
    of: tuple[int, int] | None = None,
) -> tuple[Store, Taken[T]]:
    """What `take` makes of a step, the newest unless named, and the tier that it was taken from.

    `of` is as `take_step` says.  Of the tiers that have it, the nearest of whose
    copy `take` can make something.  With `fallback`, else of the newest step
    before it in the same way; so it is if the newest is on several machines'
    disks, not all of which are here, and nothing was changed.

    Raises:
        NotFoundError: no tier has it.
        CorruptError: every copy is damaged, and so is, with `fallback`, all before it.
        CheckpointError: what else `take` raises.
    """
    if len(stores) == 1:
        (store,) = stores
        options: Any = {"fallback": fallback, "seal": seal, "of": of}
        return store, take_step(store, step, lambda one: take(store, one), **options)
    found, remarks = find_steps(stores)
    asked = step if step is not None else max(found, default=None)
    if asked is None or asked not in found:
        near = ", ".join(map(str, sorted(found)[-10:])) or "none"
        roots = ", ".join(store.root for store in stores)
        raise NotFoundError(f"{roots}: step {asked} isn't there; committed steps: {near}")
    failures: list[CheckpointError] = []
    elsewhere = step is None
    for one, store in _places(found, asked):
        if one != asked and not (fallback or elsewhere):
            break
        attempt = _Attempt(store, take)
        try:
            taken = take_step(store, one, attempt.take, fallback=False, seal=seal, of=of)
        except CheckpointError as error:
            later = failures and not isinstance(error, AuthenticationError)
            if not (later or attempt.may_be_elsewhere(error)):
                raise
            log.warning("step %d isn't taken from %s: %s", one, store.root, error)
            failures.append(error)
            elsewhere = elsewhere and attempt.is_elsewhere(error)
            continue
        told = [*remarks, *_told(store, asked, one, failures)]
        return store, Taken(taken.manifest, taken.result, tuple(told))
    raise _failure(asked, failures)


class _Attempt(Generic[T]):
    """To take a step of one store."""

    def __init__(self, store: Store, take: Callable[[Store, Manifest], T]) -> None:
        self._store, self._take = store, take
        self._manifest: Manifest | None = None

    def take(self, manifest: Manifest) -> T:
        self._manifest = manifest
        return self._take(self._store, manifest)

    def may_be_elsewhere(self, error: CheckpointError) -> bool:
        """Whether another store may have what this one failed to give."""
        if isinstance(error, NotFoundError) and self._manifest is None:
            return True  # it was deleted just now
        if isinstance(error, StorageError):
            return True
        return is_damage(error, self._store, self._manifest)

    def is_elsewhere(self, error: CheckpointError) -> bool:
        """Whether what it lacks is on another machine."""
        return is_elsewhere(error, self._store, self._manifest)


def _places(found: dict[int, list[Store]], asked: int) -> Iterator[tuple[int, Store]]:
    for step in sorted(found, reverse=True):
        if step <= asked:
            for store in found[step]:
                yield step, store


def _told(store: Store, asked: int, step: int, failures: Sequence[CheckpointError]) -> list[str]:
    if not failures:
        return []
    which = f"step {asked}" if step == asked else f"step {step}, in place of step {asked},"
    reasons = "; ".join(map(_reason, failures))
    return [f"{which} was taken from {store.root}: {reasons}"]


def _failure(asked: int, failures: Sequence[CheckpointError]) -> CheckpointError:
    if len(failures) == 1:
        return failures[0]
    reasons = "; ".join(map(_reason, failures))
    failure = CorruptError(f"step {asked}", f"it can't be taken from any tier: {reasons}")
    failure.__cause__ = failures[0]
    return failure


def _reason(error: CheckpointError) -> str:
    return f"{error.where}: {error.reason}" if isinstance(error, CorruptError) else str(error)
