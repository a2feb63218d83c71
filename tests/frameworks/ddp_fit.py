"""A fit of Lightning's on two ranks, which ends in the middle if it is told to.

python -m tests.frameworks.ddp_fit ROOT STOP
"""

from __future__ import annotations

import os
import sys
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import gpuckpt
from gpuckpt.adapters.lightning import Checkpoint
from tests.frameworks.trainings import digest


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.net(inputs), targets)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Leave(pl.Callback):
    """Ends the process as a crash does: nothing is tidied up."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == int(sys.argv[2]):
            os._exit(3)


def main() -> None:
    pl.seed_everything(0, verbose=False)
    inputs = torch.randn(48, 8)
    data, module = TensorDataset(inputs, inputs.sum(1, keepdim=True)), Net()
    saving = Checkpoint(sys.argv[1], every=gpuckpt.Every(steps=1), keep=gpuckpt.Keep(last=2))
    hidden = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    ranks: dict[str, Any] = {"devices": 2, "strategy": "ddp", "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=2, callbacks=[saving, Leave()], **ranks, **hidden)
    trainer.fit(module, DataLoader(data, 4, shuffle=True))
    # In one piece: both ranks write to the same pipe.
    os.write(1, f"digest {trainer.global_rank} {digest(module.state_dict())}\n".encode())


if __name__ == "__main__":
    main()
