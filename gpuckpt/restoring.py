"""The restores of a checkpointer: never beside a save, and what the next save goes on from."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from gpuckpt.concord import Concord
from gpuckpt.errors import AuthenticationError, CorruptError, NotFoundError, RankError, StorageError
from gpuckpt.fallback import Restoration, Taken
from gpuckpt.governor import Governor
from gpuckpt.matching import Match, Rename
from gpuckpt.nearest import find_steps, take_nearest
from gpuckpt.remarks import remark
from gpuckpt.resources import Resources
from gpuckpt.saving import Saves
from gpuckpt.seal import Seal
from gpuckpt.stores import Store
from gpuckpt.tiered import Tiers

log = logging.getLogger("gpuckpt")


class Restores:
    """Restores committed steps into a state, in place, from the nearest tier that has them."""

    def __init__(
        self,
        tiers: Tiers,
        resources: Resources,
        saves: Saves,
        governor: Governor,
        *,
        seal: Seal | None = None,
        concord: Concord | None = None,
    ) -> None:
        """`tiers`, `saves` and `governor` are those of the checkpointer."""
        self._concord = concord
        self._tiers, self._resources, self._seal = tiers, resources, seal
        self._saves, self._governor = saves, governor

    def newest(self, state: Any, *, fallback: bool, stacklevel: int) -> int:
        """Restore the newest step, if there is one; its number, or 0.

        With `every`, also takes the memory for copies of `state`.
        """
        self._saves.reap(wait=True)
        taken = None
        if self._concord is not None or find_steps(self._tiers.stores)[0]:
            taken = self._take(state, None, fallback=fallback)
        done = 0 if taken is None else self._conclude(*taken, stacklevel=stacklevel + 1)
        if self._governor.plans_saves:
            self._saves.reserve(state)
        return done

    def restore(
        self,
        state: Any,
        step: int | None,
        *,
        names: Iterable[str] | None = None,
        rename: Rename = None,
        strict: bool = True,
        fallback: bool = False,
        stacklevel: int,
    ) -> int:
        """Restore a step, the newest unless named, once no save is in flight; its number.

        It is taken from the nearest tier that has it whole.  Who called is
        told, `stacklevel` frames up, if another tier or step was taken.  After
        that, and after an error, the next save refers to nothing that may be
        damaged or isn't there.
        """
        self._saves.reap(wait=True)
        taken = self._take(
            *(state, step), fallback=fallback, names=names, rename=rename, strict=strict
        )
        if taken is None:
            raise NotFoundError(f"{self._tiers.stores[0].root}: all ranks have no step in common")
        return self._conclude(*taken, stacklevel=stacklevel + 1)

    def _take(
        self,
        state: Any,
        step: int | None,
        *,
        fallback: bool,
        names: Iterable[str] | None = None,
        rename: Rename = None,
        strict: bool = True,
    ) -> tuple[Store, Taken[Match]] | None:
        """Restore it; with other ranks, together with them, and None if they all have none."""
        rank = 0 if self._concord is None else self._concord.rank
        restoration = Restoration(
            *(state, self._resources),
            names=names,
            rename=rename,
            strict=strict,
            rank=rank,
            seal=self._seal,
        )
        take = take_nearest if self._concord is None else self._concord.take
        try:
            return take(
                *(self._tiers.stores, step, restoration.take), fallback=fallback, seal=self._seal
            )
        except (AuthenticationError, CorruptError, RankError, StorageError):
            self._saves.go_on_from(None)
            raise

    def _conclude(self, store: Store, taken: Taken[Match], *, stacklevel: int) -> int:
        """Go on from what was restored, and tell who called what there is to tell."""
        manifest, found = taken.manifest, taken.result
        for name in [*found.missing, *found.mismatched]:
            log.warning("%s keeps its value: step %d doesn't fit it", name, manifest.step)
        self._saves.go_on_from(manifest, anew=store is not self._tiers.stores[0])
        self._governor.resumed(manifest.step, manifest.epoch)
        self._tiers.resumed(manifest.step, manifest.epoch)
        remark(taken.remarks, stacklevel=stacklevel + 1)
        return manifest.step
