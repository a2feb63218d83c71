"""The model's figures for machines that nobody has measured: not measurements."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bench.scaling.model import CHUNK_NBYTES, Costs, Load, Machine, durable, stages, stall
from bench.scaling.profile import MS

GPUS = 8
GPU_NBYTES = 40e9
NODE_CORES = 64
NODE_DISK_GB_S = 6.0
PCIE_GB_S = 55.0
DEVICE_COPY_GB_S = 1000.0
NODES = 1000
SHARED_GB_S = 500.0
TENSORS = 1000
# Done by kernels for tensors on a GPU.
ON_GPU = frozenset({"fingerprint", "statistics", "sample", "split"})
ASSUMPTIONS = {
    "state": f"{GPUS} GPUs a node, {GPU_NBYTES / 1e9:g} GB of it on each, {TENSORS} tensors a GPU",
    "processes": "one a GPU, each with its own root and an eighth of the node's cores and disk",
    "device copy": f"{DEVICE_COPY_GB_S:g} GB/s, about a third of the memory bandwidth of such a "
    "GPU: assumed; an H100's is in docs/GPU.md",
    "bus": f"{PCIE_GB_S:g} GB/s a GPU to page-locked memory, all at the same time",
    "cores": f"{NODE_CORES} as fast as this machine's, none of them used by the loop; at most 8 "
    "workers a process",
    "CPU work": "of float32 zstd, checksum and the copy into a block, as measured here, since "
    "kernels take fingerprints, statistics and planes; of bfloat16 all CPU seconds of the saves "
    "measured here; deltas need as much host memory as the state has",
    "disk": f"one NVMe of {NODE_DISK_GB_S:g} GB/s a node, or a file system of {SHARED_GB_S:g} GB/s "
    f"for {NODES} nodes, shared evenly, without latency or stragglers",
    "fixed costs": "per save, tensor and chunk as fitted here, in each process",
}


def extrapolated(rows: Sequence[Any], costs: Costs) -> dict[str, Any]:
    """Stall, time to durable and the slowest stage, of a node and of many, by kind of bytes."""
    return {
        "not_measured": "the model's figures, from the assumptions beside them",
        "assumptions": ASSUMPTIONS,
        "rows": [
            _row(kind, place, machine, ratio, costs)
            for kind, ratio, coding in _kinds(rows)
            for place, machine in _machines(coding)
        ],
    }


def on_gpu_gb_s(row: Mapping[str, Any]) -> float:
    """GB/s of a core for what it does with chunks that come from a GPU, by a profile's row."""
    here = [name for name in row if name.startswith(MS) and name.removeprefix(MS) not in ON_GPU]
    seconds: float = sum(row[name]["median"] / 1e3 for name in here)
    return CHUNK_NBYTES / 1e9 / seconds


def _kinds(rows: Sequence[Any]) -> Iterator[tuple[str, float, float]]:
    """What is written: its name, its ratio, and a core's GB/s of it."""
    coding = {
        row["codec"]: on_gpu_gb_s(row)
        for row in rows
        if (row["case"], row["what"] if row["case"] == "profile" else "") == ("profile", "save")
    }
    whole = {
        row["codec"]: 1 / row["written_over_state"]["median"]
        for row in rows
        if row["case"] == "size"
    }
    links = [row for row in rows if row["case"] == "chain"]
    rates = [row["state_nbytes"] / 1e9 / row["cpu_s"]["median"] for row in links]
    yield "float32, raw", 1.0, coding["raw"]
    yield "float32, compressed", whole["zstd"], coding["auto"]
    yield "bfloat16, compressed", links[0]["state_over_written"]["median"], rates[0]
    deltas = statistics.median(row["state_over_written"]["median"] for row in links[1:])
    yield "bfloat16, deltas", deltas, statistics.median(rates[1:])


def _machines(coding: float) -> Iterator[tuple[str, Machine]]:
    cores = NODE_CORES // GPUS
    disks = {"node": NODE_DISK_GB_S / GPUS, "nodes": SHARED_GB_S / NODES / GPUS}
    for place, disk in disks.items():
        yield place, Machine(cores, DEVICE_COPY_GB_S, coding, disk, PCIE_GB_S)


def _row(kind: str, place: str, machine: Machine, ratio: float, costs: Costs) -> dict[str, Any]:
    load, costs = Load(GPU_NBYTES, TENSORS, ratio), replace(costs, copy_share=1)
    busy = stages(load, machine)
    nodes = 1 if place == "node" else NODES
    return {
        "bytes": kind,
        "nodes": nodes,
        "state_tb": nodes * GPUS * GPU_NBYTES / 1e12,
        "ratio": ratio,
        "stall_s": stall(load, machine, costs),
        "durable_s": durable(load, machine, costs),
        "slowest": max(busy, key=lambda one: busy[one]),
        "stages_s": busy,
    }
