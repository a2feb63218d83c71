"""A small transformer learns to write Python, letter by letter, from the standard library.

    python examples/torch_loop.py --root /tmp/run --steps 200

Kill it and start it again: it ends with the same bits as if it had never been killed.
"""

import argparse
import hashlib

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gpuckpt.torch
from gpuckpt.demo.text import corpus

CONTEXT = 32


class Writer(nn.Module):
    """Letters in, for each the next one's logits out."""

    def __init__(self, width=48):
        super().__init__()
        self.letters, self.places = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(width, 256)
        self.out.weight = self.letters.weight

    def forward(self, text):
        """int64[batch, context] to float32[batch, context, 256]."""
        seen = nn.Transformer.generate_square_subsequent_mask(CONTEXT, text.device)
        x = self.letters(text) + self.places.weight
        return self.out(self.layers(x, mask=seen, is_causal=True))


def digest(module):
    """Of all parameters' bytes, in the order of names."""
    every = [one.detach().cpu().numpy().tobytes() for _, one in sorted(module.named_parameters())]
    return hashlib.sha256(b"".join(every)).hexdigest()


def main():
    """Train, from the newest checkpoint if there is one."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--root", required=True)
    asked.add_argument("--steps", type=int, default=200)
    asked = asked.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = torch.from_numpy(corpus(33 * 320).astype("int64")).view(-1, CONTEXT + 1)
    loader = DataLoader(TensorDataset(text), batch_size=16, shuffle=True)
    model = Writer().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=asked.steps)

    batches = gpuckpt.torch.Batches(loader)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "data": batches}
    with gpuckpt.torch.training(asked.root, every=gpuckpt.Every(steps=4), **parts) as run:
        while run.done < asked.steps:
            for (batch,) in batches:
                here, following = batch[:, :-1].to(device), batch[:, 1:].to(device)
                loss = nn.functional.cross_entropy(model(here).mT, following)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                run.step(metrics={"loss": loss.item()})
                print("step", run.done, flush=True)  # what a test kills it after
                if run.done == asked.steps:
                    break
    print("digest", digest(model))


if __name__ == "__main__":
    main()
