"""Figures in MLflow's store, read back by MLflow."""

from __future__ import annotations

import numpy as np
import pytest

import gpuckpt
from gpuckpt.metrics import MLflow

mlflow = pytest.importorskip("mlflow", reason="needs mlflow or mlflow-skinny")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def client(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(before)


def test_the_active_run_gets_the_metrics_of_each_save(tmp_path, client):
    with mlflow.start_run() as run:
        with gpuckpt.Checkpointer(tmp_path / "root", observers=[MLflow()]) as ckpt:
            for step in (10, 20, 30):
                ckpt.save(step, {"w": np.full(50_000, float(step))})
        found = client.get_metric_history(run.info.run_id, "gpuckpt/raw_nbytes")
        slow = client.get_metric_history(run.info.run_id, "gpuckpt/slowdown_seconds")
    assert [(one.step, one.value) for one in found] == [(at, 400_000) for at in (10, 20, 30)]
    assert [one.step for one in slow] == [10, 20]


def test_without_a_run_it_says_what_to_do(client):
    with pytest.raises(gpuckpt.InvalidError, match="start_run"):
        MLflow(client)
