"""The end of a save of several ranks: from all parts that are there to what all know.

Where all have one root, rank 0 does it while the others wait for its answer:

1. It sees that every file that      The manifest must never name a file that isn't there.
   the manifest names is there.
2. It commits the manifest.          The others wait: none of them is writing what no
                                     manifest names.
3. It answers.                       Only now may a save return: returning promises durability.
4. It deletes what needn't be        Others may be writing again; what they write wasn't there
   kept, of what it saw in 1.        in 1.

Where machines have roots of their own, each lead commits the same manifest, and
nobody deletes before all have: else one root could have only a step that
another hasn't.  If one can't, the others take theirs back.  Then all gather once
more, so that nobody writes beside those who delete.  What rank 0 holds for other
tiers, it tells where it commits, and nobody deletes that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from gpuckpt.commit import commit, delete, open_step
from gpuckpt.entering import Site
from gpuckpt.errors import CheckpointError, NotFoundError, RankError
from gpuckpt.gathering import UnheardError, gather
from gpuckpt.groups import Group
from gpuckpt.manifest import Manifest
from gpuckpt.retention import Held, Keep, prune_quietly
from gpuckpt.seal import Seal
from gpuckpt.spans import Lap
from gpuckpt.stores import Store

log = logging.getLogger("gpuckpt")


@dataclass(frozen=True, slots=True)
class Place:
    """Where one of several ranks commits, and with whom.

    With `prompt`, what needn't be kept is deleted before any rank hears of the commit.
    """

    group: Group
    site: Site
    store: Store
    keep: Keep | None
    held: Callable[[], Held]
    seal: Seal | None
    timeout: float
    prompt: bool = False


def conclude(place: Place, world: Manifest, undo: Callable[[], object], lap: Lap) -> None:
    """Commit the manifest of all in the roots of all machines, and hear whether all leads did.

    On return it is durable.  `undo` deletes what this rank wrote; it is called
    where its root has no manifest that names it.

    Raises:
        RankError: another rank couldn't, or didn't say.
        CheckpointError: this one couldn't.
    """
    gone: list[bool] = []
    failure = _tried(place, world, lambda: gone.append(True)) if place.site.is_lead else None
    lap.mark("manifest")
    said: dict[str, Any] = {"held": sorted(place.held().steps)}
    if failure:
        said |= {"error": f"{type(failure).__name__}: {failure}", "gone": bool(gone)}
    try:
        told = gather(place.group, f"commit of step {world.step}", said, place.timeout)
    except UnheardError as error:
        if failure is not None:
            raise failure from error
        raise maybe_there(error, world.step) from error
    finally:
        lap.mark("ranks")
    wrong = {rank: one for rank, one in enumerate(told) if "error" in one}
    own = told[place.site.lead]
    held = frozenset(told[0]["held"])
    taken_back = _settle(place, world, take_back=bool(wrong), held=held, lap=lap)
    if wrong and own.get("gone", taken_back):
        undo()
    if failure is not None:
        raise failure
    if wrong:
        raise RankError(list(wrong), "; ".join(one["error"] for one in wrong.values()))


def maybe_there(error: UnheardError, step: int) -> UnheardError:
    """The error of a rank that doesn't know whether a step was committed."""
    # It may be visible, and yet go with the next loss of power.
    return UnheardError(error.ranks, f"{error.reason}; step {step} may be there all the same")


def commit_here(place: Place, world: Manifest, abandon: Callable[[], object]) -> set[str]:
    """Commit the manifest of all in this rank's root; `abandon` if it has surely not come there.

    The files that were there just before.

    Raises:
        NotFoundError: files that it names aren't there.
        StorageError: the storage refused.
    """
    seen = _see(place, world, abandon)
    commit(place.store, world, abandon=abandon, seal=place.seal)
    return seen


def prune_here(
    place: Place,
    world: Manifest,
    more: frozenset[int] = frozenset(),
    among: Collection[str] | None = None,
) -> None:
    """Delete what needn't be kept beside `world`, but steps `more`; of the files `among` alone."""
    try:
        held = place.held()
        held = replace(held, steps=held.steps | more)
        prune_quietly(place.store, place.keep, world, place.seal, held, among=among)
    except Exception:
        log.exception("step %d is saved; to delete others failed", world.step)


def _tried(place: Place, world: Manifest, abandon: Callable[[], object]) -> Exception | None:
    """Commit it in this root; what went wrong."""
    try:
        commit_here(place, world, abandon)
    except Exception as error:
        return error
    return None


def _see(place: Place, world: Manifest, abandon: Callable[[], object]) -> set[str]:
    """See that all is there that the ranks of this root say they have written; what is there.

    One that came late to the last save may have found its files swept away.
    """
    parts = [world.parts[rank] for rank in place.site.here]
    named = {name for part in parts for name in (part.name, *part.segments)}
    try:
        seen = set(place.store.names())
    except CheckpointError:
        abandon()
        raise
    if lost := sorted(named - seen):
        abandon()
        raise NotFoundError(
            f"{place.store.root}: {lost[0]} of step {world.step} has gone before the commit; see "
            "whether somebody else deletes files there"
        )
    return seen


def _settle(
    place: Place, world: Manifest, *, take_back: bool, held: frozenset[int], lap: Lap
) -> bool:
    """Delete what needn't be kept, or what others couldn't commit; wait until all have.

    Steps that are `held` stay.  Whether no manifest names the step's files here any more.
    """
    said = {"gone": False}
    if place.site.is_lead and take_back:
        said = {"gone": _take_back(place, world)}
    elif place.site.is_lead:
        prune_here(place, world, held)
    lap.mark("manifest")
    try:
        told = gather(place.group, f"what is left of step {world.step}", said, place.timeout)
    except UnheardError as error:
        log.warning("step %d: not all ranks have said that they are done: %s", world.step, error)
        return False
    finally:
        lap.mark("ranks")
    return bool(told[place.site.lead]["gone"])


def _take_back(place: Place, world: Manifest) -> bool:
    try:
        if _is_there(place, world):
            delete(place.store, [world.step])
    except CheckpointError as error:
        log.warning("step %d, which isn't everywhere, stays here: %s", world.step, error)
        return False
    return True


def _is_there(place: Place, world: Manifest) -> bool:
    try:
        found = open_step(place.store, world.step, place.seal, parts=False)
    except NotFoundError:
        return False
    return [part.name for part in found.parts] == [part.name for part in world.parts]
