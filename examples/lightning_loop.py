"""Lightning: a `fit` that goes on where it was, bit for bit, however it ended.

    pip install -e '.[lightning]'
    python examples/lightning_loop.py --root runs/lightning --steps 200

Kill it and start it again.  The one line that is gpuckpt's is the callback.
"""

import argparse
import hashlib
import logging

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import gpuckpt
from gpuckpt.adapters.lightning import Checkpoint


class Digits(pl.LightningModule):
    """Learns which of ten noisy patterns it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            *(torch.nn.Linear(64, 128), torch.nn.BatchNorm1d(128), torch.nn.ReLU()),
            *(torch.nn.Dropout(0.2), torch.nn.Linear(128, 10)),
        )

    def training_step(self, batch, batch_idx):
        """The loss of one batch."""
        del batch_idx
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        """Adam, and a schedule by epochs."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)]


class Tell(pl.Callback):
    """Prints each step."""

    def on_train_batch_end(self, trainer, *_):
        """After the optimizer's step."""
        print("step", trainer.global_step, flush=True)


def main() -> None:
    """Train, with a checkpoint every five steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", required=True)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    pl.seed_everything(0, verbose=False)
    labels = torch.randint(10, (1024,))
    images = torch.randn(10, 64)[labels] + torch.randn(1024, 64)
    module, data = Digits(), TensorDataset(images, labels)
    checkpoint = Checkpoint(options.root, every=gpuckpt.Every(steps=5), keep=gpuckpt.Keep(last=2))
    trainer = pl.Trainer(
        max_steps=options.steps,
        callbacks=[checkpoint, Tell()],
        accelerator="cpu",
        **dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False),
    )
    trainer.fit(module, DataLoader(data, batch_size=64, shuffle=True))

    state = sorted(module.state_dict().items())
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for _, tensor in state))
    print("digest", digest.hexdigest())


if __name__ == "__main__":
    main()
