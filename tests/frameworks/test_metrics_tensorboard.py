"""Figures in TensorBoard's files, read back by TensorBoard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import gpuckpt
from gpuckpt.metrics import TensorBoard

reading = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    found = reading.EventAccumulator(str(directory))
    found.Reload()
    return {
        tag: [(one.step, one.value) for one in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def train(root: Path, observer: TensorBoard) -> None:
    with gpuckpt.Checkpointer(root, observers=[observer]) as ckpt:
        for step in (10, 20, 30):
            ckpt.save(step, {"w": np.full(50_000, float(step))})


def check(directory: Path) -> None:
    found = scalars(directory)
    assert found["gpuckpt/raw_nbytes"] == [(10, 400_000), (20, 400_000), (30, 400_000)]
    assert [step for step, _ in found["gpuckpt/slowdown_seconds"]] == [10, 20]
    assert all(value > 0 for _, value in found["gpuckpt/background_seconds"])


def test_a_directory_gets_the_scalars_of_each_save(tmp_path):
    train(tmp_path / "run", TensorBoard(tmp_path / "board"))
    check(tmp_path / "board")


def test_tensorboardx_writer_does_as_well(tmp_path):
    tensorboard_x = pytest.importorskip("tensorboardX", reason="needs tensorboardX")
    with tensorboard_x.SummaryWriter(str(tmp_path / "board")) as writer:
        train(tmp_path / "run", TensorBoard(writer))
    check(tmp_path / "board")


def test_pytorchs_writer_does_as_well(tmp_path):
    pytest.importorskip("torch", reason="needs torch")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "board")) as writer:
        train(tmp_path / "run", TensorBoard(writer))
    check(tmp_path / "board")
