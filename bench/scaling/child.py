"""What is measured in a process of its own: fewer cores, and peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpuckpt
from bench.scaling.saves import BUFFERS_NBYTES, COPIED, Way, in_turn
from bench.scaling.states import like, weights


def in_child(what: str, directory: Path, *numbers: int) -> list[dict[str, Any]]:
    """The rows that `main` prints in a process of its own."""
    words = (what, str(directory), *map(str, numbers))
    command = (sys.executable, "-m", "bench.scaling.child", *words)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def on_cores(
    directory: Path, cores: int, nbytes: int, tensors: int, rounds: int
) -> list[dict[str, Any]]:
    """Saves and restores with this process on so many of its cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    rows = in_turn(directory, weights(nbytes, tensors), COPIED, rounds)
    return [{"case": "cores", "cores": cores} | row for row in rows]


def peak_memory(directory: Path, nbytes: int, tensors: int) -> list[dict[str, Any]]:
    """Most resident memory of a save and of a restore, over what the state and a copy take."""
    state = weights(nbytes, tensors)
    target = like(state)
    base, rows = _resident("VmRSS"), []
    for codec in ("raw", "zstd"):
        way = Way("hold", codec)
        with gpuckpt.Checkpointer(
            directory / codec, codec=codec, snapshot="hold", memory=BUFFERS_NBYTES
        ) as ckpt:
            _reset_peak()
            ckpt.save(1, state).result()
            saved = _resident("VmHWM") - base
            _reset_peak()
            ckpt.restore(target)
            restored = _resident("VmHWM") - base
        rows.append(
            {"case": "memory", "state_nbytes": nbytes, "tensors": tensors, **way._asdict()}
            | {"budget_nbytes": BUFFERS_NBYTES}
            | {"save_peak_nbytes": saved, "restore_peak_nbytes": restored}
        )
    return rows


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", "ascii")


def main() -> None:
    """Measure what the words say, print the rows as JSON."""
    what, directory, *words = sys.argv[1:]
    numbers = map(int, words)
    if what == "cores":
        rows = on_cores(Path(directory), *numbers)
    else:
        rows = peak_memory(Path(directory), *numbers)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
