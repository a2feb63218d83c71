"""Each kernel compiles for every supported architecture, into the machine code that was meant.

NVRTC needs no driver for that. Registers, spills and shared memory are read from ptxas' report,
the width of loads and stores from the disassembly.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gpuckpt.devices import kernels

ARCHITECTURES = (75, 80, 90, 100, 120)
# Bytes of shared memory: four blocks fit an SM but of sm_75, which has 64 KiB.
KERNELS = {
    "filter": 22840,
    "unfilter": 20784,
    "digest": 20784,
    "gather": 0,
    "scatter": 0,
    "survey": 0,
    "sample": 16384,
    "pack": 0,
}
# Loads and stores of 16 bytes: four units a lane for each way that bytes come or go.  Of two copies
# a lane takes 4 bytes at a time, of many planes at once.
WIDE = {
    "filter": (12, 16),
    "unfilter": (16, 4),
    "digest": (8, 0),
    "gather": (1, 5),
    "scatter": (5, 1),
    **dict.fromkeys(("survey", "sample", "pack"), (0, 0)),
}
# 256 threads of 64 registers, four times: what `__launch_bounds__` asks for, half an SM's threads.
REGISTERS_MAX = 64
REPORT = ("--ptxas-options=-v", "--ptxas-options=-warn-spills")

each_kernel = pytest.mark.parametrize("name", KERNELS)
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@functools.cache
def compiled(name: str, architecture: int) -> tuple[bytes, str]:
    """The machine code, and what ptxas says of it."""
    pytest.importorskip("cupy", reason="compiling needs CuPy (make test-cuda installs it)")
    from cupy.cuda import compiler, nvrtc

    try:
        nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"compiling needs NVRTC (PyPI: nvidia-cuda-nvrtc): {error}")
    program = compiler._NVRTCProgram(kernels.source(name), f"{name}.cu", (), (), method="cubin")
    log = io.StringIO()
    options = (*kernels.OPTIONS, f"-arch=sm_{architecture}", *REPORT)
    code, _ = program.compile((*options, "--device-as-default-execution-space"), log)
    return bytes(code), log.getvalue()


def disassembler() -> str | None:
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations or () if spec else ()
    found = (Path(place) / "cu13" / "bin" / "nvdisasm" for place in places)
    return next((str(path) for path in found if path.exists()), shutil.which("nvdisasm"))


def instructions(code: bytes, path: Path) -> list[str]:
    """The disassembly's operations with their modifiers."""
    tool = disassembler()
    if tool is None:
        pytest.skip("disassembling needs nvdisasm (PyPI: nvidia-cuda-nvdisasm)")
    path.write_bytes(code + b"\0")  # CuPy drops the last byte
    done = subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True)
    line = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
    return line.findall(done.stdout)


@each_architecture
@each_kernel
def test_a_kernel_compiles_without_spills_within_its_registers(name, architecture):
    _, report = compiled(name, architecture)

    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", report)]
    stack = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report)
    assert len(registers) == 1, report
    assert registers[0] <= REGISTERS_MAX
    assert shared == ([KERNELS[name]] if KERNELS[name] else [])
    assert stack
    assert set(stack) == {"0"}


@each_architecture
@each_kernel
def test_a_kernel_moves_16_bytes_at_a_time_and_nothing_in_local_memory(
    name, architecture, tmp_path
):
    code, _ = compiled(name, architecture)
    found = instructions(code, tmp_path / "kernel.cubin")

    def count(kind: str, modifier: str) -> int:
        return sum(op.split(".")[0] == kind and modifier in op.split(".") for op in found)

    assert len(found) > 500
    assert not [op for op in found if op.split(".")[0] in {"LDL", "STL"}]
    assert count("LDG", "128") >= WIDE[name][0]
    assert count("STG", "128") >= WIDE[name][1]
    assert not [op for op in found if op.split(".")[0] in {"LD", "ST"}]  # all known to be global
    if name in {"filter", "unfilter"}:
        assert count("LDS", "128") + count("STS", "128") >= 16
