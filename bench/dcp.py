"""A state of four ranks saved and loaded by torch.distributed.checkpoint: gpuckpt beside its files.

    python -m bench.dcp [--megabytes 256] [--rounds 5]

Each rank has a quarter of every tensor.  Both storages save and load the same
state in turn, `rounds` times, on the same disk; `FileSystemWriter` syncs its
files, as gpuckpt does.  Prints bytes on disk, and the quotient of seconds,
gpuckpt's by torch's, median (least to most).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RANKS = 4


def state_of(megabytes: int) -> dict[str, Any]:
    """bfloat16 parameters, float32 masters and moments, normally distributed, split by rows."""
    import torch
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (RANKS,))
    rows = megabytes * 2**20 // (14 * 4096 * RANKS)
    generator = torch.Generator().manual_seed(mesh.get_rank())
    found = {}
    for name in ("master", "exp_avg", "exp_avg_sq"):
        own = torch.randn(rows, 4096, generator=generator) * 0.02
        found[name] = DTensor.from_local(own, mesh, [Shard(0)])
    own = found["master"].to_local().to(torch.bfloat16)
    return found | {"parameters": DTensor.from_local(own, mesh, [Shard(0)])}


def work(folder: Path, rank: int, port: int, megabytes: int, rounds: int) -> None:
    """One rank; the first writes down what was measured."""
    from torch import distributed
    from torch.distributed import checkpoint as dcp

    from gpuckpt.adapters.dcp import StorageReader, StorageWriter

    store = distributed.TCPStore("127.0.0.1", port, RANKS, rank == 0)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    state = state_of(megabytes)
    ways: dict[str, tuple[Any, Any]] = {
        "torch": (dcp.FileSystemWriter, dcp.FileSystemReader),
        "gpuckpt": (StorageWriter, StorageReader),
    }
    rows = []
    for at in range(rounds + 1):
        row: dict[str, float] = {}
        for name, (writer, reader) in ways.items():
            place = folder / name
            if rank == 0:
                shutil.rmtree(place, ignore_errors=True)
            distributed.barrier()
            begun = time.perf_counter()
            dcp.save(state, storage_writer=writer(place))
            saved = time.perf_counter()
            dcp.load(state, storage_reader=reader(place))
            distributed.barrier()
            row[f"{name} save"] = saved - begun
            row[f"{name} load"] = time.perf_counter() - saved
            row[f"{name} bytes"] = sum(one.stat().st_size for one in place.iterdir())
        if at:  # the first warms up
            rows.append(row)
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    distributed.destroy_process_group()


def main() -> None:
    """Start the ranks, and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", nargs=3, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        folder, rank, port = given.rank
        work(Path(folder), int(rank), int(port), given.megabytes, given.rounds)
        return
    from tests.launch import free_port

    with tempfile.TemporaryDirectory(dir=".") as folder:
        port = str(free_port())
        command = [sys.executable, "-m", "bench.dcp", "--megabytes", str(given.megabytes)]
        command += ["--rounds", str(given.rounds), "--rank", str(Path(folder).absolute())]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen([*command, str(rank), port], env=environment) for rank in range(RANKS)
        ]
        codes = [one.wait() for one in ranks]
        if any(codes):
            sys.exit(f"ranks ended with {codes}")
        rows = json.loads(Path(folder, "rows.json").read_text())
    share = rows[-1]["gpuckpt bytes"] / rows[-1]["torch bytes"]
    print(f"bytes: {rows[-1]['gpuckpt bytes']} of {rows[-1]['torch bytes']}: {share:.3f}")
    for what in ("save", "load"):
        found = sorted(row[f"gpuckpt {what}"] / row[f"torch {what}"] for row in rows)
        median = statistics.median(found)
        print(f"{what}: {median:.2f} ({found[0]:.2f} to {found[-1]:.2f})")


if __name__ == "__main__":
    main()
