"""Figures for MLflow."""

from __future__ import annotations

from typing import Any

from gpuckpt.errors import InvalidError
from gpuckpt.journal import Record
from gpuckpt.metrics.figures import PREFIX, Before, figures


class MLflow:
    """Logs each save's figures as metrics `gpuckpt/…` of a run, at its step, in one request."""

    def __init__(self, client: Any = None, run_id: str | None = None) -> None:
        """`client` is an `MlflowClient`, or else a new one; the run is the active one or `run_id`.

        Make it in the thread that has started the run: others don't see it.

        Raises:
            InvalidError: MLflow isn't installed, or no run is active.
        """
        try:
            import mlflow
            from mlflow.entities import Metric
        except ImportError as error:
            raise InvalidError("MLflow() needs its package: pip install mlflow") from error
        if run_id is None:
            active = mlflow.active_run()
            if active is None:
                raise InvalidError("MLflow() needs a run: call mlflow.start_run(), or give run_id=")
            run_id = active.info.run_id
        self._client = mlflow.MlflowClient() if client is None else client
        self._metric, self._run_id, self._before = Metric, run_id, Before()

    def saved(self, record: Record) -> None:
        """Log a save, and the slow-down of the one before at that one's step."""
        metrics = [self._made(name, value, record) for name, value in figures(record).items()]
        if (found := self._before.slowdown(record)) is not None:
            before, seconds = found
            metrics.append(self._made("slowdown_seconds", seconds, before))
        self._client.log_batch(self._run_id, metrics=metrics)

    def _made(self, name: str, value: float, record: Record) -> Any:
        return self._metric(PREFIX + name, value, round(record.ended * 1000), record.stats.step)
