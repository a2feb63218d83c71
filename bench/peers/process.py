"""What processes have used: memory now and at most, CPU time, of this one and those below it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Self

_TICK = os.sysconf("SC_CLK_TCK")


def memory_nbytes(field: str, pid: int | None = None) -> int:
    """`VmRSS` (resident now) or `VmHWM` (resident at most) of a process; 0 if it is gone."""
    try:
        text = Path(f"/proc/{pid or os.getpid()}/status").read_text("ascii", "replace")
    except OSError:
        return 0
    values = [line.split()[1] for line in text.splitlines() if line.startswith(f"{field}:")]
    return int(values[0]) * 1024 if values else 0


def reset_peak() -> None:
    """Let `VmHWM` of this process begin anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def descendants(pid: int | None = None) -> list[int]:
    """Children, their children and so on, of those that live."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        fields = _stat(path)
        if fields:
            parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found: list[int] = []
    waiting = [pid or os.getpid()]
    while waiting:
        below = parents.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def tree_cpu_seconds() -> float:
    """CPU seconds of this process and of all below it, also of those it has waited for."""
    used = time.process_time()
    times = os.times()
    used += times.children_user + times.children_system
    for pid in descendants():
        fields = _stat(Path(f"/proc/{pid}/stat"))
        used += sum(map(int, fields[11:15])) / _TICK if fields else 0.0
    return used


def machine_cpu_seconds() -> float:
    """CPU seconds that the whole machine has been busy, or was held up from outside, since boot."""
    first = Path("/proc/stat").read_text("ascii").split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first[:8])
    return (user + nice + system + irq + softirq + steal) / _TICK


class OthersWatch:
    """How much of the machine others used inside a `with` block: `share`, of all its cores."""

    def __init__(self) -> None:
        self.share = 0.0
        self._begun = (0.0, 0.0, 0.0)

    def __enter__(self) -> Self:
        self._begun = self._now()
        return self

    def __exit__(self, *failure: object) -> None:
        wall, busy, own = (now - then for now, then in zip(self._now(), self._begun, strict=True))
        cores = os.cpu_count() or 1
        self.share = others_share(busy, own, wall * cores)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        return time.perf_counter(), machine_cpu_seconds(), tree_cpu_seconds()


def others_share(busy: float, own: float, capacity: float) -> float:
    """The share of `capacity` CPU seconds that was busy with others' work."""
    return max(0.0, busy - own) / capacity if capacity > 0 else 0.0


def _stat(path: Path) -> list[str]:
    """The fields after the name: state, parent and so on; none if the process is gone."""
    try:
        return path.read_text("ascii", "replace").rpartition(")")[2].split()
    except OSError:
        return []
