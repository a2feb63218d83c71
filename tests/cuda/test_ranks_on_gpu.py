"""Ranks with DTensors on a GPU, in a process group of NCCL: saved, killed, resumed by others.

None of these tests runs on the stand-in.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch import free_port

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
    pytest.skip("this torch has no CUDA device, or no NCCL", allow_module_level=True)

pytestmark = pytest.mark.gpu
REPOSITORY = Path(__file__).parents[2]


def run(root: Path, size: int, axis: int, last: int, **more: Any) -> list[Any]:
    """What each rank said, or the signal that ended it."""
    port, processes = free_port(), []
    for rank in range(size):
        told = {"root": str(root), "rank": rank, "size": size, "axis": axis, "last": last}
        command = [sys.executable, "-m", "tests.cuda.rank_on_gpu"]
        paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        processes.append(
            subprocess.Popen(
                [*command, json.dumps(told | {"port": port} | more)],
                cwd=REPOSITORY,
                env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    found = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        if process.returncode == 0:
            found.append(json.loads(out.splitlines()[-1]))
        else:
            found.append(process.returncode if process.returncode < 0 else err)
    return found


@pytest.mark.parametrize(("snapshot", "codec"), [("copy", "auto"), ("hold", "delta")])
def test_what_two_ranks_save_is_resumed_by_any_number_along_any_axis(tmp_path, snapshot, codec):
    options = {"snapshot": snapshot, "codec": codec}
    assert run(tmp_path / "run", 2, 0, 3, **options) == [{"step": 3, "resumed": 0}] * 2
    for size, axis in ((1, 0), (3, 1)):
        found = run(tmp_path / "run", size, axis, 3, **options)
        assert found == [{"step": 3, "resumed": 3}] * size


@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_is_killed_costs_nothing_that_was_committed(tmp_path, dies):
    options = {"snapshot": "copy", "codec": "auto"}
    found = run(tmp_path / "run", 2, 0, 3, dies=dies, **options)
    assert found[dies] == -signal.SIGKILL
    other = found[1 - dies]
    assert f"rank {dies}" in str(other) or other == {"step": 3, "resumed": 0}
    done = run(tmp_path / "run", 2, 1, 4, **options)
    assert done[0] == done[1]
    assert done[0]["resumed"] in (2, 3)
