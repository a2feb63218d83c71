"""FSDP2 and torch.distributed.checkpoint: sharded by two processes, resumed by any number.

    python examples/dcp_fsdp2.py --root /tmp/run --steps 60

Kill them and start again: they end with the same bits. `--ranks 3` goes on with three.
"""

import argparse
import hashlib
import socket

import torch
from torch import distributed, multiprocessing, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from gpuckpt.adapters.dcp import StorageReader, StorageWriter
from gpuckpt.demo.text import corpus

CONTEXT, BATCH = 16, 12


def state_of(model, optimizer, step):
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "step": step}


def train(rank, port, options):
    """What each of the processes does."""
    where = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", where, rank=rank, world_size=options.ranks)
    of_saves = distributed.new_group()  # a save in the background talks beside the training
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = nn.Embedding(256, 32), nn.Flatten(), nn.Linear(32 * CONTEXT, 128), nn.GELU()
    model = fully_shard(nn.Sequential(*layers, nn.Linear(128, 256)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.from_numpy(corpus(17 * 320).astype("int64")).view(-1, CONTEXT + 1)

    place, done, pending = f"{options.root}/latest", 0, None
    if StorageReader.validate_checkpoint_id(place):
        state = state_of(model, optimizer, 0)
        dcp.load(state, storage_reader=StorageReader(place))
        parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(model, optimizer, **parts)
        done = state["step"]
    for step in range(done + 1, options.steps + 1):
        batch = text[torch.arange(step * BATCH, (step + 1) * BATCH)[rank :: options.ranks] % 320]
        loss = nn.functional.cross_entropy(model(batch[:, :-1]), batch[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 4 == 0 or step == options.steps:
            if pending is not None:
                pending.result()
            state, writer = state_of(model, optimizer, step), StorageWriter(place)
            pending = dcp.async_save(state, storage_writer=writer, process_group=of_saves)
        if rank == 0:
            print("step", step, flush=True)
    if pending is not None:
        pending.result()
    whole = [one.full_tensor().detach() for _, one in sorted(model.named_parameters())]
    if rank == 0:
        every = b"".join(tensor.numpy().tobytes() for tensor in whole)
        print("digest", hashlib.sha256(every).hexdigest(), flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--root", required=True)
    asked.add_argument("--steps", type=int, default=60)
    asked.add_argument("--ranks", type=int, default=2)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        free = found.getsockname()[1]
    given = asked.parse_args()
    multiprocessing.start_processes(train, (free, given), given.ranks, start_method="fork")
