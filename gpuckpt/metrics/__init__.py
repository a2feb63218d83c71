"""Saves' figures for what people watch their runs with.

Each class is an `Observer`: give it to `Checkpointer(observers=[…])`, or `replay` a log
to it.  Their libraries are imported only once one is made.
"""

from gpuckpt.journal import Record
from gpuckpt.metrics.figures import replay
from gpuckpt.metrics.ml_flow import MLflow
from gpuckpt.metrics.open_telemetry import OpenTelemetry
from gpuckpt.metrics.prometheus import Prometheus
from gpuckpt.metrics.tensor_board import TensorBoard
from gpuckpt.metrics.weights_and_biases import Wandb
from gpuckpt.observers import Observer

__all__ = [
    "MLflow",
    "Observer",
    "OpenTelemetry",
    "Prometheus",
    "Record",
    "TensorBoard",
    "Wandb",
    "replay",
]
