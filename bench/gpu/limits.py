"""What this GPU, its bus and the disk do at best: every other figure is a share of these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from bench.device import event_seconds
from bench.disk import drop_cache, read_through, write_and_sync
from bench.gpu.scale import Scale
from bench.timing import spread

_runtime = cupy.cuda.runtime


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes a second, each the best of all rounds.

    `copy` counts bytes read and bytes written, the others bytes moved.
    """

    copy: float
    to_host: float
    to_device: float
    write: float
    read_cold: float
    read_warm: float


def limits(directory: Path, scale: Scale) -> tuple[Limits, list[dict[str, Any]]]:
    """The limits, and the rows that they were taken from."""
    rows = [device_copy(scale)]
    for kind in ("to_host", "to_device"):
        rows += [host_copy(scale, kind, piece) for piece in scale.pieces_nbytes]
    rows += disk(directory, scale)

    def best(case: str) -> float:
        return max(float(row["bytes_per_s"]["max"]) for row in rows if row["case"] == case)

    names = ("device-copy", "to_host", "to_device", "disk-write", "disk-read-cold")
    return Limits(*(best(name) for name in (*names, "disk-read-warm"))), rows


def device_copy(scale: Scale) -> dict[str, Any]:
    """A plain copy from the device's memory to the device's memory."""
    nbytes = scale.copy_nbytes
    source, target = cupy.zeros(nbytes, np.uint8), cupy.empty(nbytes, np.uint8)
    kind = _runtime.memcpyDeviceToDevice
    stream = cupy.cuda.get_current_stream().ptr

    def work() -> None:
        _runtime.memcpyAsync(target.data.ptr, source.data.ptr, nbytes, kind, stream)

    return _row("device-copy", scale, work, nbytes, moved_nbytes=2 * nbytes)


def host_copy(scale: Scale, kind: str, piece_nbytes: int) -> dict[str, Any]:
    """Copies between page-locked memory and the device, one after the other."""
    total = max(scale.copy_nbytes // piece_nbytes, 1) * piece_nbytes
    pinned = cupy.cuda.alloc_pinned_memory(total)
    np.frombuffer(pinned, np.uint8, total)[:] = 1
    device = cupy.zeros(total, np.uint8)
    to_host = kind == "to_host"
    ends = (pinned.ptr, device.data.ptr) if to_host else (device.data.ptr, pinned.ptr)
    how = _runtime.memcpyDeviceToHost if to_host else _runtime.memcpyHostToDevice
    stream = cupy.cuda.get_current_stream().ptr

    def work() -> None:
        for start in range(0, total, piece_nbytes):
            _runtime.memcpyAsync(ends[0] + start, ends[1] + start, piece_nbytes, how, stream)

    return _row(kind, scale, work, piece_nbytes, moved_nbytes=total)


def disk(directory: Path, scale: Scale) -> list[dict[str, Any]]:
    """A file written and synced, then read: after the system was asked to forget it, and again."""
    data = np.random.default_rng(7).integers(0, 256, scale.disk_nbytes, np.uint8)
    path = directory / "limits" / "plain.bin"
    path.parent.mkdir()
    took: dict[str, list[float]] = {"disk-write": [], "disk-read-cold": [], "disk-read-warm": []}
    for _ in range(scale.rounds):
        took["disk-write"].append(write_and_sync(path, [data]))
        drop_cache(path.parent)
        took["disk-read-cold"].append(read_through(path))
        took["disk-read-warm"].append(read_through(path))
    path.unlink()
    return [
        {
            "case": case,
            "nbytes": data.nbytes,
            "bytes_per_s": spread(data.nbytes / one for one in seconds),
        }
        for case, seconds in took.items()
    ]


def timed(scale: Scale, work: Callable[[], object]) -> list[float]:
    """Seconds on the stream, by events, of each round but the first ones."""
    return [event_seconds(work) for _ in range(scale.warm_ups + scale.rounds)][scale.warm_ups :]


def _row(
    case: str, scale: Scale, work: Callable[[], object], nbytes: int, *, moved_nbytes: int
) -> dict[str, Any]:
    rates = spread(moved_nbytes / seconds for seconds in timed(scale, work))
    return {"case": case, "nbytes": nbytes, "moved_nbytes": moved_nbytes, "bytes_per_s": rates}
