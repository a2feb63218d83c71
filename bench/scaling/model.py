"""What a save will cost, from a few rates: a pipeline whose slowest stage decides.

The caller's stall is a copy of the state, and some work for each tensor.
Until it is durable, the state's bytes pass the bus (from a GPU), the CPU, which
its cores share, and the disk, all at the same time.  What doesn't overlap is
added: the first chunks, the last block, and work for each tensor and chunk
that one thread does, or that holds the interpreter's lock.

`auto` compresses while the disk has work: as large a share of the state as the
cores get done in the time that the disk takes for what is left of the bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

CHUNK_NBYTES = 4 << 20
BLOCK_NBYTES = 8 << 20
WORKERS_MAX = 8
GB = 1e9


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates in GB/s: of a copy of the state by one thread, of one core's coding, of disk and bus.

    `coding_gb_s` is of the state's bytes through all that a save's CPU work
    is, with or without compression; `pcie_gb_s` is infinite for host arrays.
    """

    cores: int
    copy_gb_s: float
    coding_gb_s: float
    disk_gb_s: float
    pcie_gb_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Load:
    """A state, and the bytes in memory for each byte that is written of it."""

    nbytes: float
    tensors: int
    ratio: float = 1.0

    @property
    def chunks(self) -> float:
        """Of 4 MiB, but at least one a tensor."""
        return max(self.nbytes / CHUNK_NBYTES, self.tensors)


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds that rates don't tell: fixed, for each tensor, for each full chunk's bytes."""

    stall_fixed_s: float
    stall_tensor_s: float
    durable_fixed_s: float
    durable_tensor_s: float
    durable_chunk_s: float
    copy_share: float = 1.0
    """The time that several threads take for a copy, as a share of one thread's."""


def stall(load: Load, machine: Machine, costs: Costs) -> float:
    """Seconds for which `copy` blocks the caller."""
    copied = load.nbytes / GB / machine.copy_gb_s
    if machine.cores > 1:
        copied *= costs.copy_share
    return costs.stall_fixed_s + costs.stall_tensor_s * load.tensors + copied


def stages(load: Load, machine: Machine) -> dict[str, float]:
    """Seconds that each stage is busy."""
    workers = min(machine.cores, WORKERS_MAX)
    return {
        "bus": load.nbytes / GB / machine.pcie_gb_s,
        "cores": load.nbytes / GB / (machine.coding_gb_s * workers),
        "disk": load.nbytes / load.ratio / GB / machine.disk_gb_s,
    }


def fill(load: Load, machine: Machine) -> float:
    """Seconds in which the pipeline isn't full: a first chunk, a last block."""
    chunk, block = (min(load.nbytes, one) for one in (CHUNK_NBYTES, BLOCK_NBYTES))
    return chunk / GB / machine.coding_gb_s + block / load.ratio / GB / machine.disk_gb_s


def durable(load: Load, machine: Machine, costs: Costs) -> float:
    """Seconds from the call until the checkpoint is durable."""
    return (
        stall(load, machine, costs)
        + costs.durable_fixed_s
        + costs.durable_tensor_s * load.tensors
        + costs.durable_chunk_s * load.nbytes / CHUNK_NBYTES
        + fill(load, machine)
        + max(stages(load, machine).values())
    )


def share_encoded(load: Load, raw: Machine, encoding: Machine) -> float:
    """The share of the state that `auto` compresses, of what would have `load.ratio` whole.

    The machines differ in a core's rate, for chunks that are left as they are
    and for those that are compressed.
    """
    left, whole = stages(replace(load, ratio=1), raw), stages(load, encoding)
    gained, spent = left["disk"] - whole["disk"], whole["cores"] - left["cores"]
    spare = left["disk"] - left["cores"]
    return max(0.0, min(1.0, spare / (gained + spent))) if gained + spent > 0 else 1.0


def mixed(load: Load, raw: Machine, encoding: Machine) -> tuple[Load, Machine]:
    """What `auto` writes, and at which rate a core gets that done."""
    share = share_encoded(load, raw, encoding)
    seconds = share / encoding.coding_gb_s + (1 - share) / raw.coding_gb_s
    written = share / load.ratio + (1 - share)
    return replace(load, ratio=1 / written), replace(raw, coding_gb_s=1 / seconds)
