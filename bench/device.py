"""The GPU, or the stand-in for one, that a benchmark runs on.

Import cupy only after one of these was called.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from typing import Any

from tests.cuda_on_cpu import standin

STAND_IN = "stand-in"


class NoGpuError(Exception):
    """There is none, and why."""


def open_gpu() -> str:
    """The name of the real GPU that is cupy's current device.

    Raises:
        NoGpuError: there is none, or the stand-in was asked for.
    """
    if os.environ.get(standin.VARIABLE):
        raise NoGpuError(f"{standin.VARIABLE} asks for the stand-in, which is no GPU")
    try:
        from cupy.cuda import runtime
    except ImportError as error:
        raise NoGpuError(f"no CuPy: {error}") from error
    try:
        properties = runtime.getDeviceProperties(runtime.getDevice())
    except runtime.CUDARuntimeError as error:
        raise NoGpuError(f"no CUDA device: {error}") from error
    return str(properties["name"].decode())


def open_stand_in() -> str:
    """Install the stand-in, as `GPUCKPT_STANDIN` says or else with a thread for each stream.

    Raises:
        NoGpuError: it isn't built.
    """
    reason = standin.available()
    if reason:
        raise NoGpuError(reason)
    settings = standin.parse(os.environ.get(standin.VARIABLE, ""))
    standin.install(**({"mode": "async"} | settings))
    return STAND_IN


def open_what_is_there() -> str:
    """The stand-in if `GPUCKPT_STANDIN` asks for it, else the GPU.

    Raises:
        NoGpuError: there is neither.
    """
    return open_stand_in() if os.environ.get(standin.VARIABLE) else open_gpu()


def describe(name: str) -> dict[str, Any]:
    """What there is to know about the current device."""
    import cupy

    runtime = cupy.cuda.runtime
    facts: dict[str, Any] = {"device": name, "cupy": cupy.__version__}
    if name == STAND_IN:
        return facts
    found = runtime.getDeviceProperties(runtime.getDevice())
    return facts | {
        "compute_capability": f"{found['major']}.{found['minor']}",
        "multiprocessors": found["multiProcessorCount"],
        "memory_gib": round(found["totalGlobalMem"] / 2**30, 1),
        "cuda_driver": runtime.driverGetVersion(),
        "cuda_runtime": runtime.runtimeGetVersion(),
        "nvidia_smi": _nvidia_smi(),
    }


def event_seconds(work: Callable[[], object]) -> float:
    """Seconds that what `work` gives to cupy's current stream took there."""
    import cupy

    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return seconds_between(begin, end)


def seconds_between(begin: Any, end: Any) -> float:
    """Of two events that have happened."""
    import cupy

    return float(cupy.cuda.get_elapsed_time(begin, end)) / 1000


def _nvidia_smi() -> str:
    wanted = (
        "pcie.link.gen.current,pcie.link.width.current,clocks.max.sm,clocks.max.mem,power.limit"
    )
    words = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
