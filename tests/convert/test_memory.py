"""A conversion's memory doesn't depend on the size of what is converted.

Measured in processes of their own: the peak resident set (VmHWM) over that with
everything imported.  Of torch's files, which are mapped, pages of the file don't count:
the system takes them back when it wants; so what is anonymous is sampled.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from gpuckpt.conversion.safetensors import SAFETENSORS
from tests.convert.states import written
from tests.often import LONG

MIB = 1 << 20
PROGRAM = """
    import json, sys, threading, time
    import gpuckpt

    def resident(field):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

    target, to = sys.argv[2:]
    field = "RssAnon" if target.endswith(".pt") or to == "dcp" else "VmHWM"
    if field == "RssAnon" or sys.argv[1].endswith(".pt"):
        import torch.distributed.checkpoint
        field = "RssAnon"
    if "orbax" in sys.argv[1] or to == "orbax":
        import orbax.checkpoint
    before = resident(field)
    most, ended = [before], threading.Event()

    def look():
        while not ended.wait(0.005):
            most[0] = max(most[0], resident("RssAnon"))

    thread = threading.Thread(target=look)
    thread.start()
    done = gpuckpt.convert(sys.argv[1], target, to=to or None, memory="128 MiB")
    ended.set()
    thread.join()
    after = resident(field) if field == "VmHWM" else most[0]
    print(json.dumps({"before": before, "peak": after - before, "nbytes": done.nbytes}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A state of 1 GiB: a tensor of 768 MiB, and 32 of 8."""
    folder = tmp_path_factory.mktemp("large")
    if shutil.disk_usage(folder).free < 8 << 30:
        pytest.skip("there isn't room for four states of 1 GiB")
    block = np.random.default_rng(0).standard_normal(MIB // 4).astype(np.float32)
    large = np.broadcast_to(block, (768, block.size))
    small = {f"w{at}": np.broadcast_to(block + at, (8, block.size)) for at in range(32)}
    path = written({"large": large, **small}, SAFETENSORS, folder / "x.safetensors")
    yield path
    shutil.rmtree(folder)


def peak(source: Path, target: Path, to: str = "", nbytes: int = 1 << 30) -> int:
    """Bytes that a conversion took at most."""
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(source), str(target), to]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert found["nbytes"] == nbytes
    print(f"{source.name} to {target.name}: {found['peak'] / MIB:.0f} MiB")
    return int(found["peak"])


@pytest.mark.parametrize("name", ["run", "x.npz", "x.pt", "checkpoint_1"])
def test_1_gib_is_converted_there_and_back_within_256_mib(name, source):
    if name == "x.pt":
        pytest.importorskip("torch", reason="torch isn't installed")
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if pages < 2 << 30:
        pytest.skip("there is too little memory to tell")
    target, back = source.parent / name, source.parent / "back.safetensors"
    try:
        assert peak(source, target) < 256 * MIB
        assert peak(target, back) < 256 * MIB
        assert back.stat().st_size - source.stat().st_size < MIB
    finally:
        shutil.rmtree(target, ignore_errors=True)
        for path in (target, back):
            path.unlink(missing_ok=True) if not path.is_dir() else None


# What others hold as a whole is measured with less, for it is slower; and with more now and then.
WHOLE = (512 if LONG else 256) * MIB


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A state of 256 (or 512) MiB: three quarters are one tensor, the others have 8 MiB each."""
    folder = tmp_path_factory.mktemp("half")
    if shutil.disk_usage(folder).free < 8 * WHOLE:
        pytest.skip("there isn't room for so many states")
    block = np.random.default_rng(0).standard_normal(MIB // 4).astype(np.float32)
    rest = range(WHOLE // MIB // 32)
    small = {f"w{at}": np.broadcast_to(block + at, (8, block.size)) for at in rest}
    large = np.broadcast_to(block, (WHOLE // MIB * 3 // 4, block.size))
    path = written({"large": large, **small}, SAFETENSORS, folder / "x.safetensors")
    yield path
    shutil.rmtree(folder)


@pytest.mark.parametrize("to", ["dcp", "orbax"])
def test_states_that_dcp_and_orbax_would_hold_as_a_whole_go_through_in_less(to, half):
    package = {"dcp": "torch", "orbax": "orbax.checkpoint"}[to]
    pytest.importorskip(package, reason=f"{package} isn't installed")
    target, back = half.parent / to, half.parent / "back.safetensors"
    try:
        assert peak(half, target, to, WHOLE) < 192 * MIB
        assert peak(target, back, "", WHOLE) < 192 * MIB
    finally:
        shutil.rmtree(target, ignore_errors=True)
        back.unlink(missing_ok=True)


def test_what_orbax_wrote_in_one_chunk_is_read_a_little_at_a_time(half):
    pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint isn't installed")
    folder, nbytes = half.parent / "orbax-by-itself", WHOLE * 3 // 4
    program = """
        import sys, numpy as np, orbax.checkpoint as ocp
        large = np.random.default_rng(0).random((int(sys.argv[2]) >> 22, 1 << 20), np.float32)
        ocp.PyTreeCheckpointer().save(sys.argv[1], {"large": large})
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(folder), str(nbytes)]
    subprocess.run(command, capture_output=True, check=True)
    try:
        assert peak(folder, half.parent / "back.safetensors", "", nbytes) < 160 * MIB
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        (half.parent / "back.safetensors").unlink(missing_ok=True)
