"""Restores of several ranks: of one step, which all have, or of none."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gpuckpt.commit import open_step, steps
from gpuckpt.errors import CheckpointError, NotFoundError, RankError
from gpuckpt.fallback import Restoration, Taken, is_damage, passed_over
from gpuckpt.gathering import gather
from gpuckpt.groups import Group
from gpuckpt.manifest import Manifest
from gpuckpt.matching import Match
from gpuckpt.seal import Seal
from gpuckpt.stores import Store

log = logging.getLogger("gpuckpt")

# Of as many steps each rank tells that it has them.
_TOLD = 1000


class Concord:
    """Restores of one rank of several, each at the same time as those of all others."""

    def __init__(self, group: Group, timeout: float) -> None:
        """Waits for the others at most `timeout` seconds at a time."""
        self._group, self._timeout = group, timeout

    def restore(
        self,
        restoration: Restoration,
        store: Store,
        step: int | None,
        *,
        fallback: bool,
        seal: Seal | None,
    ) -> Taken[Match] | None:
        """Restore a step, or the newest that all ranks see; None if there is none.

        With `fallback`, if it is damaged for any of them, all take the next older one.

        Raises:
            CheckpointError: what went wrong on this rank.
            RankError: what went wrong on others, or that they ask for another step.
        """
        candidates = _best_first(self._common(store, step), step, store)
        for at, one in enumerate(candidates):
            of = self._group.rank, self._group.size
            taken, failure, damaged = _try(restoration, store, one, seal, of)
            answer = {"damaged": damaged, "failed": "" if failure is None else str(failure)}
            told = gather(self._group, f"restore of step {one}", answer, self._timeout)
            failed = [rank for rank, answer in enumerate(told) if answer["failed"]]
            if not failed:
                assert taken is not None
                return replace(taken, remarks=self._remarks(candidates, at))
            may_go_on = fallback and all(told[rank]["damaged"] for rank in failed)
            self._reason = f"rank {failed[0]}: {told[failed[0]]['failed']}"
            if not may_go_on or at + 1 == len(candidates):
                raise failure or RankError(failed, told[failed[0]]["failed"])
            log.warning("step %d isn't taken: %s", one, self._reason)
        return None

    def _remarks(self, candidates: Sequence[int], at: int) -> tuple[str, ...]:
        if not at:
            return ()
        return (passed_over(candidates[0], self._reason, candidates[at]),)

    def _common(self, store: Store, step: int | None) -> list[int]:
        """The committed steps that every rank sees, ascending."""
        own: Any
        try:
            own = {"step": step, "steps": steps(store)[-_TOLD:]}
        except CheckpointError as error:
            own = error
        told = gather(self._group, "steps to restore", own, self._timeout)
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


def _best_first(common: Sequence[int], step: int | None, store: Store) -> list[int]:
    """The steps to try.

    Raises:
        NotFoundError: there isn't the one that was asked for.
    """
    if step is None:
        return list(reversed(common))
    if step not in common:
        near = ", ".join(map(str, common[-10:])) or "none"
        raise NotFoundError(f"{store.root}: step {step} isn't there; all ranks see: {near}")
    return [step, *(older for older in reversed(common) if older < step)]


def _try(
    restoration: Restoration, store: Store, step: int, seal: Seal | None, of: tuple[int, int]
) -> tuple[Taken[Match] | None, Exception | None, bool]:
    """What came of restoring a step, or what went wrong, and whether that is damage."""
    manifest: Manifest | None = None
    try:
        manifest = open_step(store, step, seal, of=of)
        return Taken(manifest, restoration.take(manifest)), None, False
    except CheckpointError as error:
        return None, error, is_damage(error, store, manifest)
    except Exception as error:
        return None, error, False
