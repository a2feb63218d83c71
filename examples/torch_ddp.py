"""Two processes train one model on text, by DistributedDataParallel over gloo.

    python examples/torch_ddp.py --root /tmp/run --steps 60

Both make one checkpoint together. Kill them and start again: they end with the same bits.
"""

import argparse
import hashlib
import socket

import torch
from torch import distributed, multiprocessing, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import gpuckpt.torch
from gpuckpt.demo.text import corpus

RANKS, CONTEXT = 2, 16


def digest(module):
    """Of all parameters' bytes, in the order of names."""
    every = [one.detach().numpy().tobytes() for _, one in sorted(module.named_parameters())]
    return hashlib.sha256(b"".join(every)).hexdigest()


def train(rank, port, root, steps):
    """What each of the processes does."""
    where = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # dropout differs; the model is rank 0's
    text = torch.from_numpy(corpus(17 * 320).astype("int64")).view(-1, CONTEXT + 1)
    sampler = DistributedSampler(TensorDataset(text), RANKS, rank)
    loader = DataLoader(sampler.dataset, batch_size=8, sampler=sampler)
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(
            *(nn.Embedding(256, 32), nn.Flatten(), nn.Linear(32 * CONTEXT, 128), nn.GELU()),
            *(nn.Dropout(0.1), nn.Linear(128, 256)),
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    batches = gpuckpt.torch.Batches(loader)
    parts = {"model": model, "optimizer": optimizer, "data": batches}
    with gpuckpt.torch.training(root, every=gpuckpt.Every(steps=4), **parts) as run:
        while run.done < steps:
            sampler.set_epoch(batches.epoch)
            for (batch,) in batches:
                loss = nn.functional.cross_entropy(model(batch[:, :-1]), batch[:, -1])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                run.step(metrics={"loss": loss.item()})
                if rank == 0:
                    print("step", run.done, flush=True)
                if run.done == steps:
                    break
    if rank == 0:
        print("digest", digest(model), flush=True)
    distributed.destroy_process_group()


def main():
    """Start the processes, and wait for them."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--root", required=True)
    asked.add_argument("--steps", type=int, default=60)
    asked = asked.parse_args()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    given = port, asked.root, asked.steps
    multiprocessing.start_processes(train, given, RANKS, start_method="fork")


if __name__ == "__main__":
    main()
