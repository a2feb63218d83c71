"""The restores of a checkpointer: never beside a save, and what the next save goes on from."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from gpuckpt.commit import steps
from gpuckpt.concord import Concord
from gpuckpt.errors import AuthenticationError, CorruptError, NotFoundError, RankError, StorageError
from gpuckpt.fallback import Restoration, Taken, restore_step
from gpuckpt.governor import Governor
from gpuckpt.matching import Match, Rename
from gpuckpt.remarks import remark
from gpuckpt.resources import Resources
from gpuckpt.saving import Saves
from gpuckpt.seal import Seal
from gpuckpt.stores import Store

log = logging.getLogger("gpuckpt")


class Restores:
    """Restores committed steps into a state, in place."""

    def __init__(
        self,
        store: Store,
        resources: Resources,
        saves: Saves,
        governor: Governor,
        *,
        seal: Seal | None = None,
        concord: Concord | None = None,
    ) -> None:
        """`saves` and `governor` are those of the checkpointer."""
        self._concord = concord
        self._store, self._resources, self._seal = store, resources, seal
        self._saves, self._governor = saves, governor

    def newest(self, state: Any, *, fallback: bool, stacklevel: int) -> int:
        """Restore the newest step, if there is one; its number, or 0.

        With `every`, also takes the memory for copies of `state`.
        """
        self._saves.reap(wait=True)
        taken = None
        if self._concord is not None or steps(self._store):
            taken = self._take(state, None, fallback=fallback)
        done = 0 if taken is None else self._conclude(taken, stacklevel=stacklevel + 1)
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

        Who called is told, `stacklevel` frames up, if another step was taken.
        After an error the next save refers to nothing that may be damaged.
        """
        self._saves.reap(wait=True)
        taken = self._take(
            *(state, step), fallback=fallback, names=names, rename=rename, strict=strict
        )
        if taken is None:
            raise NotFoundError(f"{self._store.root}: no checkpoint is there for all ranks")
        return self._conclude(taken, stacklevel=stacklevel + 1)

    def _take(
        self, state: Any, step: int | None, *, fallback: bool, **options: Any
    ) -> Taken[Match] | None:
        """Restore it; with other ranks, together with them, and None if they all have none."""
        place = self._store, self._resources
        chosen = {"names": None, "rename": None, "strict": True} | options
        try:
            if self._concord is None:
                return restore_step(
                    *(state, *place, step), **chosen, fallback=fallback, seal=self._seal
                )
            restoration = Restoration(state, *place, **chosen, seal=self._seal)
            return self._concord.restore(
                restoration, self._store, step, fallback=fallback, seal=self._seal
            )
        except (AuthenticationError, CorruptError, RankError, StorageError):
            self._saves.go_on_from(None)
            raise

    def _conclude(self, taken: Taken[Match], *, stacklevel: int) -> int:
        """Go on from what was restored, and tell who called what there is to tell."""
        manifest, found = taken.manifest, taken.result
        for name in [*found.missing, *found.mismatched]:
            log.warning("%s keeps its value: step %d doesn't fit it", name, manifest.step)
        self._saves.go_on_from(manifest)
        self._governor.resumed(manifest.step, manifest.epoch)
        remark(taken.remarks, stacklevel=stacklevel + 1)
        return manifest.step
