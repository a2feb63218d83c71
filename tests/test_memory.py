"""Memory is bounded by `memory=`, whatever the state's size, and doesn't grow from save to save.

Measured in processes of their own: the peak resident set (VmHWM) over that
with only the state, which is what a training run would see.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from tests.often import LONG

MIB = 1 << 20
STATE_GIB = 4 if LONG else 1  # both are far above the budget

PRELUDE = """
    import json, sys
    import numpy as np
    import gpuckpt

    def resident(field):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

    def arrays(count, nbytes):
        block = np.random.default_rng(0).standard_normal(1 << 18).astype(np.float32)
        return {f"w{at}": np.tile(block, nbytes // block.nbytes) for at in range(count)}
"""


def measure(program: str, root, *given: int) -> dict:
    """Run a program that prints its measurements as JSON."""
    text = textwrap.dedent(PRELUDE) + textwrap.dedent(program)
    command = [sys.executable, "-c", text, str(root), *map(str, given)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    measured: dict = json.loads(finished.stdout)
    return measured


def has_room(directory) -> bool:
    """Whether the state and its checkpoint fit this machine."""
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    wanted = (STATE_GIB + 2) << 30
    return pages > wanted and shutil.disk_usage(directory).free > wanted


def test_a_state_of_gigabytes_saves_and_restores_within_256_mib(tmp_path):
    program = """
        state = arrays(32, int(sys.argv[2]))
        before = resident("VmRSS")
        with gpuckpt.Checkpointer(sys.argv[1], snapshot="hold", memory="256 MiB") as ckpt:
            ckpt.save(1, state).result()
            saved = resident("VmHWM")
            expected = state["w31"][-5:].copy()
            for array in state.values():
                array.fill(0)
            ckpt.restore(state)
        restored = resident("VmHWM")
        assert (state["w31"][-5:] == expected).all()
        print(json.dumps({"save": saved - before, "restore": restored - before,
                          "state": sum(array.nbytes for array in state.values())}))
    """

    if not has_room(tmp_path):
        pytest.skip(f"needs {STATE_GIB + 2} GiB of memory and of disk")
    peak = measure(program, tmp_path, (STATE_GIB << 30) // 32)

    print({name: f"{nbytes / MIB:.0f} MiB" for name, nbytes in peak.items()})
    assert peak["state"] == STATE_GIB << 30
    assert peak["save"] <= (256 + 150) * MIB
    assert peak["restore"] <= (256 + 150) * MIB


def test_200_saves_take_no_more_memory_than_20(tmp_path):
    program = """
        state = arrays(40, 1 << 20)
        sizes = {}
        with gpuckpt.Checkpointer(
            sys.argv[1], every=gpuckpt.Every(steps=1), keep=gpuckpt.Keep(last=1)
        ) as ckpt:
            for step in range(1, 221):
                with ckpt.update():
                    state["w0"] += 1
                ckpt.step(step, state)
                if step in (20, 220):
                    ckpt.wait()
                    sizes[step] = resident("VmRSS")
        print(json.dumps({"growth": sizes[220] - sizes[20]}))
    """

    growth = measure(program, tmp_path)["growth"]

    print(f"{growth / MIB:.2f} MiB")
    assert growth <= 8 * MIB
