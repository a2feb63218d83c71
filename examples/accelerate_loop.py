"""Accelerate: a loop of one's own, which goes on where it was, bit for bit, however it ended.

    pip install -e '.[accelerate]'
    python examples/accelerate_loop.py --root runs/accelerate --steps 200

Kill it and start it again.  `AcceleratorState` stands for `save_state` and `load_state`.
"""

import argparse
import hashlib

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import gpuckpt
from gpuckpt.adapters.accelerate import AcceleratorState


def main():
    """Train, with a checkpoint every five steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    torch.manual_seed(0)
    labels = torch.randint(10, (1024,))
    data = TensorDataset(torch.randn(10, 64)[labels] + torch.randn(1024, 64), labels)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    loader = DataLoader(data, batch_size=64, shuffle=True)

    seedable = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(dataloader_config=seedable)
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
    average = AveragedModel(accelerator.unwrap_model(model), multi_avg_fn=get_ema_multi_avg_fn(0.9))
    accelerator.register_for_checkpointing(average)

    run = AcceleratorState(accelerator)
    with gpuckpt.Checkpointer(options.root, every=gpuckpt.Every(steps=5)) as ckpt:
        step = ckpt.resume({"run": run})
        while step < options.steps:
            for images, found in run.batches(loader, *divmod(step, len(loader))):
                accelerator.backward(nn.functional.cross_entropy(model(images), found))
                with ckpt.update():
                    optimizer.step()
                    schedule.step()
                    average.update_parameters(accelerator.unwrap_model(model))
                optimizer.zero_grad()
                step += 1
                ckpt.step(step, {"run": run})
                if accelerator.is_main_process:
                    print("step", step, flush=True)
                if step == options.steps:
                    break

    if accelerator.is_main_process:
        ends = [*accelerator.unwrap_model(model).parameters(), *average.parameters()]
        every = b"".join(one.detach().cpu().numpy().tobytes() for one in ends)
        print("digest", hashlib.sha256(every).hexdigest())


if __name__ == "__main__":
    main()
