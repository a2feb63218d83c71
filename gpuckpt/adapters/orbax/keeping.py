"""Which steps are kept: as Orbax's options say."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuckpt.adapters.orbax.options import CheckpointManagerOptions
from gpuckpt.errors import InvalidError
from gpuckpt.manifest import Manifest
from gpuckpt.retention import Keep

log = logging.getLogger("gpuckpt")

# What `best_fn` said, among a step's metrics.
BEST = "best_fn"


@dataclass(frozen=True)
class OrbaxKeep(Keep):
    """The union of what the options keep, and the newest."""

    options: CheckpointManagerOptions | None = None

    def survivors(
        self, manifests: Sequence[Manifest], now: Callable[[], float] = time.time
    ) -> set[int]:
        """The steps that are kept; `now` doesn't matter."""
        del now
        options, steps = self.options or CheckpointManagerOptions(), [m.step for m in manifests]
        kept = set(steps[-1:])
        if options.keep_period is not None:
            kept |= {step for step in steps if step % options.keep_period == 0}
        if options.keep_time_interval is not None:
            kept |= _apart(manifests, options.keep_time_interval.total_seconds())
        most = len(steps) if options.max_to_keep is None else options.max_to_keep
        if options.best_fn is None:
            return kept | set(steps[len(steps) - most :])
        ranked = by_quality(manifests, options)
        kept |= set(ranked[max(len(ranked) - most, 0) :])
        return kept | (
            set(steps) - set(ranked) if options.keep_checkpoints_without_metrics else set()
        )


def keep_of(options: CheckpointManagerOptions) -> Keep | None:
    """What a checkpointer is to keep; None: all."""
    if options.max_to_keep is None and (
        options.best_fn is None or options.keep_checkpoints_without_metrics
    ):
        return None
    # So that manifests are read, for their metrics and times.
    return OrbaxKeep(best=(BEST, options.best_mode, 1), options=options)


def by_quality(manifests: Sequence[Manifest], options: CheckpointManagerOptions) -> list[int]:
    """The steps that have metrics, the best last."""
    known = [(one.metrics.get(BEST, math.nan), one.step) for one in manifests]
    known = [pair for pair in known if not math.isnan(pair[0])]
    sign = 1 if options.best_mode == "max" else -1
    return [step for _, step in sorted(known, key=lambda pair: (sign * pair[0], pair[1]))]


def numbers_of(metrics: Any, options: CheckpointManagerOptions) -> dict[str, float] | None:
    """A step's metrics as they are saved, with what `best_fn` says of them.

    Raises:
        InvalidError: they aren't numbers by name.
    """
    if metrics is None:
        if options.best_fn is not None:
            log.warning("there is a best_fn, and a step without metrics")
        return None
    written = {} if options.prevent_write_metrics else metrics
    try:
        found = {str(name): float(np.asarray(value)) for name, value in _pairs(written)}
    except (TypeError, ValueError) as error:
        raise InvalidError(
            f"metrics are numbers by name ({error}); save others as JsonSave"
        ) from error
    if options.best_fn is not None:
        found[BEST] = float(options.best_fn(metrics))
    return found


def _pairs(metrics: Any) -> Sequence[tuple[Any, Any]]:
    if not isinstance(metrics, Mapping):
        raise TypeError(f"got a {type(metrics).__name__}")
    return list(metrics.items())


def _apart(manifests: Sequence[Manifest], seconds: float) -> set[int]:
    """The first, and of the others each that is at least so long after the last of these."""
    kept: set[int] = set()
    last = -math.inf
    for one in manifests:
        if one.created - last >= seconds:
            kept.add(one.step)
            last = one.created
    return kept
