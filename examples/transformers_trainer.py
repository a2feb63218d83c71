"""Transformers: a Trainer that goes on where it was, bit for bit, however it ended.

    pip install -e '.[transformers]'
    python examples/transformers_trainer.py --root runs/transformers --steps 200

A tiny GPT-2, made from its configuration, learns the bytes of this file.
Kill it and start it again.
"""

import argparse
import hashlib
import tempfile
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import gpuckpt
from gpuckpt.adapters.transformers import Checkpoint

LENGTH = 32


class Bytes(Dataset):
    """Pieces of this file's text."""

    def __init__(self) -> None:
        self.text = torch.tensor(list(Path(__file__).read_bytes()))

    def __len__(self) -> int:
        return 128

    def __getitem__(self, at: int) -> dict:
        piece = self.text[at * 8 : at * 8 + LENGTH]
        return {"input_ids": piece, "labels": piece}


class Tell(TrainerCallback):
    """Prints each step."""

    def on_step_end(self, args, state, control, **_):
        """After the optimizer's step."""
        del args, control
        print("step", state.global_step, flush=True)


def main() -> None:
    """Train, with a checkpoint every three steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", required=True)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    checkpoint = Checkpoint(options.root, every=gpuckpt.Every(steps=3), keep=gpuckpt.Keep(last=2))
    with tempfile.TemporaryDirectory() as elsewhere:
        arguments = TrainingArguments(
            output_dir=elsewhere,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model, arguments, train_dataset=Bytes(), callbacks=[checkpoint, Tell()])
        trainer.train(resume_from_checkpoint=checkpoint.resume(trainer))

    state = sorted(model.state_dict().items())
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for _, tensor in state))
    print("digest", digest.hexdigest())


if __name__ == "__main__":
    main()
