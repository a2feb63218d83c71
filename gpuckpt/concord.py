"""Restores of several ranks: of one step, which all have, or of none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from gpuckpt.commit import open_step
from gpuckpt.errors import CheckpointError, NotFoundError, RankError
from gpuckpt.fallback import Taken, is_damage, is_elsewhere, passed_over
from gpuckpt.gathering import gather, gather_done
from gpuckpt.groups import Group
from gpuckpt.manifest import Manifest
from gpuckpt.matching import Match
from gpuckpt.nearest import find_steps, take_nearest
from gpuckpt.seal import Seal
from gpuckpt.spares import Spares
from gpuckpt.stores import Store

log = logging.getLogger("gpuckpt")

# Of as many steps each rank tells that it has them.
_TOLD = 1000


class Concord:
    """Restores of one rank of several, each at the same time as those of all others."""

    def __init__(self, group: Group, timeout: float, spares: Spares | None = None) -> None:
        """Waits for the others at most `timeout` seconds at a time."""
        self._spares = spares
        self.rank = group.rank
        self._group, self._timeout, self._size = group, timeout, group.size

    def take(
        self,
        stores: Sequence[Store],
        step: int | None,
        take: Callable[[Store, Manifest], Match],
        *,
        fallback: bool,
        seal: Seal | None,
    ) -> tuple[Store, Taken[Match]] | None:
        """As `take_nearest`, on all ranks: a step, or the newest that all have; None if none is.

        With `fallback`, if it is damaged for any of them, all take the next older one.
        So they do with tiers, if what one wants of the newest is on a machine that isn't here.

        Raises:
            CheckpointError: what went wrong on this rank.
            RankError: what went wrong on others, or that they ask for another step.
        """
        if self._spares is not None:
            self._spares.recover()
        candidates = _best_first(self._common(stores, step), step, stores)
        asked, reason = (candidates or [0])[0], ""
        whys: set[str] = set()
        for at, one in enumerate(candidates):
            last = at + 1 == len(candidates)
            if not self._is_one(stores, one, seal):
                reason = "ranks have different checkpoints under its number"
                if step is not None and not fallback:
                    raise RankError(list(range(self._size)), f"step {one}: {reason}")
                log.warning("step %d isn't taken: %s", one, reason)
                continue
            found, failure, why = _try(stores, one, take, seal, (self.rank, self._size))
            answer = {"why": why, "failed": "" if failure is None else _brief(failure)}
            try:
                told = gather(self._group, f"restore of step {one}", answer, self._timeout)
                failed = [rank for rank, answer in enumerate(told) if answer["failed"]]
                if not failed:
                    assert found is not None
                    store, taken = found
                    more = _remarks(asked, reason, one, whole=whys != {"elsewhere"})
                    return store, replace(taken, remarks=(*taken.remarks, *more))
                whys = {told[rank]["why"] for rank in failed}
                passes = {"damaged", "elsewhere"} if fallback else {"elsewhere"}
                may_go_on = whys <= passes and (fallback or (step is None and len(stores) > 1))
                reason = f"rank {failed[0]}: {told[failed[0]]['failed']}"
                if failure is not None and (last or not may_go_on):
                    raise failure
                if last or not may_go_on:
                    raise RankError(failed, told[failed[0]]["failed"])
            finally:
                del failure
            log.warning("step %d isn't taken: %s", one, reason)
        return None

    def _is_one(self, stores: Sequence[Store], step: int, seal: Seal | None) -> bool:
        """Whether all ranks have the same checkpoint under a number, or what they have is damaged.

        Those with roots of their own may not: one may have saved a step again.
        """
        try:
            store = find_steps(stores)[0][step][0]
            said = repr(open_step(store, step, seal, parts=False).created)
        except (CheckpointError, KeyError):
            said = ""
        told = gather(self._group, f"look at step {step}", said, self._timeout)
        return len(set(told) - {""}) <= 1

    def _common(self, stores: Sequence[Store], step: int | None) -> list[int]:
        """The committed steps that every rank sees, ascending."""
        told = gather_done(
            self._group,
            "steps to restore",
            lambda: {"step": step, "steps": sorted(find_steps(stores)[0])[-_TOLD:]},
            self._timeout,
        )
        asked = ["the newest" if one["step"] is None else one["step"] for one in told]
        for rank, one in enumerate(asked):
            if one != asked[0]:
                raise RankError([0, rank], f"asked for {asked[0]} and for {one}; ask for one step")
        common = set(told[0]["steps"]).intersection(*(one["steps"] for one in told))
        newest = max((max(one["steps"], default=-1) for one in told), default=-1)
        behind = [rank for rank, one in enumerate(told) if newest not in one["steps"]]
        if newest >= 0 and behind and step is None:
            log.warning("step %d isn't taken: ranks %s don't have it", newest, behind)
        return sorted(common)


def _best_first(common: Sequence[int], step: int | None, stores: Sequence[Store]) -> list[int]:
    """The steps to try.

    Raises:
        NotFoundError: there isn't the one that was asked for.
    """
    if step is None:
        return list(reversed(common))
    if step not in common:
        near = ", ".join(map(str, common[-10:])) or "none"
        roots = ", ".join(store.root for store in stores)
        raise NotFoundError(f"{roots}: step {step} isn't there; all ranks see: {near}")
    return [step, *(older for older in reversed(common) if older < step)]


def _remarks(asked: int, reason: str, taken: int, *, whole: bool) -> tuple[str, ...]:
    what = "is damaged" if whole else "isn't whole"
    return () if asked == taken else (passed_over(asked, reason, taken, what),)


def _brief(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _try(
    stores: Sequence[Store],
    step: int,
    take: Callable[[Store, Manifest], Match],
    seal: Seal | None,
    of: tuple[int, int],
) -> tuple[tuple[Store, Taken[Match]] | None, BaseException | None, str]:
    """What came of restoring a step, or what went wrong; why, if it says nothing of older ones."""
    seen: list[tuple[Store, Manifest]] = []

    def noting(store: Store, manifest: Manifest) -> Match:
        seen.append((store, manifest))
        return take(store, manifest)

    try:
        found = take_nearest(stores, step, noting, fallback=False, seal=seal, of=of), None, ""
    except CheckpointError as error:
        store, manifest = seen[-1] if seen else (stores[0], None)
        damaged = "damaged" if is_damage(error, store, manifest) else ""
        return None, error, "elsewhere" if is_elsewhere(error, store, manifest) else damaged
    except BaseException as error:
        return None, error, ""
    return found
