"""The README's loop of PyTorch's: as short as can be, and it goes on bit for bit."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from tests import pages
from tests.frameworks.trainings import StopError, digest

torch = pytest.importorskip("torch", reason="torch isn't installed")

from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402


def shown() -> str:
    """The one block of the README's that trains by `gpuckpt.torch`."""
    (block,) = [
        block.text
        for block in pages.blocks(pages.ROOT / "README.md")
        if block.language == "python" and "gpuckpt.torch.training(" in block.text
    ]
    return block


def trained(root: Any, stop: int | None = None) -> tuple[str, list[float]]:
    """The digest at its end, and what the batches were that it saw."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(70, 4), torch.randint(0, 2, (70,)))
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen: list[float] = []

    def train_step(x: Any, y: Any) -> Any:
        if len(seen) == stop:
            raise StopError
        seen.append(float(x.sum()))
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    names = {"loader": DataLoader(data, 24, shuffle=True), "train_step": train_step}
    block = shown().replace("runs/a", str(root)).replace("seconds=600", "steps=4")
    with contextlib.suppress(StopError):
        exec(block, {"model": model, "optimizer": optimizer, **names})
    return digest(model.state_dict()), seen


def test_a_newcomers_loop_has_less_than_ten_lines():
    assert len([line for line in shown().splitlines() if line]) < 10


def test_the_loop_goes_on_where_it_was_and_ends_with_the_same_bits(tmp_path):
    whole, seen = trained(tmp_path / "whole")
    assert len(seen) == 30
    _, before = trained(tmp_path / "ended", stop=14)
    resumed, rest = trained(tmp_path / "ended")

    assert before + rest[2:] == seen  # 12 steps were saved, and two are done again
    assert resumed == whole
