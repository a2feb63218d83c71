"""Which checkpoints are kept."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta

from gpuckpt.commit import delete, open_step, steps, sweep
from gpuckpt.errors import CheckpointError, InvalidError
from gpuckpt.manifest import Manifest
from gpuckpt.seal import Seal
from gpuckpt.sizes import parse_seconds
from gpuckpt.stores import Store

log = logging.getLogger("gpuckpt")


@dataclass(frozen=True)
class Keep:
    """Which checkpoints survive: the union of these, and always the newest.

    `last=2` the two newest (Fluid's `max_num_checkpoints`), `every=1000` the
    steps that 1000 divides, `best=("loss", "min", 3)` the three with the
    smallest metric (one without it, or with NaN, is never among them),
    `newer_than="2 h"` those made since then.
    """

    last: int | None = None
    every: int | None = None
    best: tuple[str, str, int] | None = None
    newer_than: float | str | timedelta | None = None

    def __post_init__(self) -> None:
        if all(getattr(self, f.name) is None for f in fields(self)):
            raise InvalidError("Keep needs at least one of last, every, best, newer_than")
        for name in ("last", "every"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InvalidError(f"Keep: {name} is a positive integer, got {value!r}")
        if self.best is not None:
            _check_best(self.best)
        if self.newer_than is not None:
            parse_seconds(self.newer_than)

    def survivors(
        self, manifests: Sequence[Manifest], now: Callable[[], float] = time.time
    ) -> set[int]:
        """The steps of those of `manifests` that survive."""
        steps = sorted(manifest.step for manifest in manifests)
        kept = set(steps[-(self.last or 1) :])
        if self.every is not None:
            kept |= {step for step in steps if step % self.every == 0}
        if self.newer_than is not None:
            since = now() - parse_seconds(self.newer_than)
            kept |= {manifest.step for manifest in manifests if manifest.created >= since}
        return kept | self._best(manifests)

    def _best(self, manifests: Sequence[Manifest]) -> set[int]:
        if self.best is None:
            return set()
        metric, direction, count = self.best
        known = [
            (manifest.metrics[metric], manifest.step)
            for manifest in manifests
            if not math.isnan(manifest.metrics.get(metric, math.nan))
        ]
        known.sort(key=lambda pair: (pair[0] if direction == "min" else -pair[0], -pair[1]))
        return {step for _, step in known[:count]}


def check_keep(keep: object) -> None:
    """See that it is a `Keep`, or None.

    Raises:
        InvalidError: it isn't; a number, for instance, says less than one might think.
    """
    if not isinstance(keep, Keep | None):
        raise InvalidError(f"keep is like gpuckpt.Keep(last=2), got {keep!r}")


def _check_best(best: tuple[str, str, int]) -> None:
    hint = f'Keep: best is like ("loss", "min", 3), got {best!r}'
    if not isinstance(best, tuple) or len(best) != 3:
        raise InvalidError(hint)
    metric, direction, count = best
    if not isinstance(metric, str) or direction not in ("min", "max"):
        raise InvalidError(hint)
    if not isinstance(count, int) or count < 1:
        raise InvalidError(hint)


@dataclass(frozen=True, slots=True)
class Held:
    """Steps and segments that somebody still needs, whatever `Keep` says."""

    steps: frozenset[int] = frozenset()
    segments: frozenset[str] = frozenset()


NOTHING = Held()


def prune(
    store: Store,
    keep: Keep | None,
    committed: Manifest | None = None,
    seal: Seal | None = None,
    held: Held = NOTHING,
    *,
    among: Collection[str] | None = None,
) -> list[int]:
    """Delete the steps that `keep` doesn't keep, and what no manifest names; their numbers.

    A step that was `committed` just now survives even if it isn't the newest:
    a run that was set back to an older step begins below those that it left
    behind.  What is `held` survives, too.  With a `seal`, manifests that aren't
    sealed say nothing.  Call it only while holding the store's lock; if others
    are writing what no manifest names, with the names `among` which nothing is theirs.
    """
    doomed = [step for step in outdated(store, keep, committed, seal) if step not in held.steps]
    found = [step for step in steps(store) if step not in doomed]
    if committed is not None and found and found[-1] > committed.step:
        log.warning(
            "step %d is older than step %d, which resume takes; use another root to go on from it",
            *(committed.step, found[-1]),
        )
    if doomed:
        delete(store, doomed, committed, held.segments, among)
    else:
        sweep(store, committed=committed, spared=held.segments, among=among)
    return doomed


def outdated(
    store: Store, keep: Keep | None, known: Manifest | None, seal: Seal | None = None
) -> list[int]:
    """The steps that `keep` doesn't keep: never the newest, nor that of the one that is `known`."""
    found = steps(store) if keep is not None else []
    if keep is None or not found:
        return []
    kept = keep.survivors(_facts(store, keep, found, seal))
    kept |= {known.step} if known is not None else set()
    return [step for step in found if step not in kept]


def _facts(store: Store, keep: Keep, found: Sequence[int], seal: Seal | None) -> list[Manifest]:
    """As much of the manifests as `keep` asks for: none of them is read for step numbers."""
    if keep.best is None and keep.newer_than is None:
        return [Manifest(step, {"dict": []}, ()) for step in found]
    return [open_step(store, step, seal, parts=False) for step in found]


def prune_quietly(
    store: Store,
    keep: Keep | None,
    committed: Manifest,
    seal: Seal | None = None,
    held: Held = NOTHING,
    *,
    among: Collection[str] | None = None,
) -> None:
    """`prune` after a save, which is durable whatever happens here: a failure costs only space."""
    try:
        prune(store, keep, committed, seal, held, among=among)
    except CheckpointError as error:
        log.warning("old checkpoints could not be deleted: %s", error)
