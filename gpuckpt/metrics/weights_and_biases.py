"""Figures for Weights & Biases."""

from __future__ import annotations

from typing import Any

from gpuckpt.errors import InvalidError
from gpuckpt.journal import Record
from gpuckpt.metrics.figures import PREFIX, Before, figures


class Wandb:
    """Logs each save's figures to a run, over a step of their own, `gpuckpt/step`.

    A save ends some steps after it began, and a run drops what is logged for
    steps that are past.  So figures go into the run's current row
    (`commit=False`), which its next `log` sends, or its end.
    """

    def __init__(self, run: Any) -> None:
        """`run` is what `wandb.init` returned; it stays its owner's to finish.

        Raises:
            InvalidError: it isn't one.
        """
        if not callable(getattr(run, "log", None)):
            raise InvalidError(f"Wandb takes a run, which wandb.init returns; got {run!r}")
        self._run, self._before = run, Before()
        run.define_metric(f"{PREFIX}step")
        run.define_metric(f"{PREFIX}*", step_metric=f"{PREFIX}step")

    def saved(self, record: Record) -> None:
        """Log a save, and how much the one before slowed the loop down."""
        found = {PREFIX + name: value for name, value in figures(record).items()}
        found[f"{PREFIX}step"] = record.stats.step
        if (before := self._before.slowdown(record)) is not None:
            found[f"{PREFIX}slowdown_seconds_before"] = before[1]
        self._run.log(found, commit=False)
