"""Gives this directory's tests a CUDA device: the stand-in, a real GPU, or none with the reason.

The environment variable `GPUCKPT_STANDIN` asks for the stand-in (see tests/cuda_on_cpu). Without a
device the test modules are not even imported, so that they may import CuPy at their top.
"""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.cuda_on_cpu import run, standin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def find_device() -> tuple[dict[str, Any] | None, str | None]:
    """The stand-in's settings where it is installed, and why there is no device where none is."""
    if os.environ.get(standin.VARIABLE):
        reason = standin.available()
        return (None, reason) if reason else (standin.install_from_environment(), None)
    try:
        from cupy.cuda import runtime
    except ImportError as error:
        return None, f"no CuPy: {error}"
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return None, f"no CUDA device: {error}"
    return None, None if count else "no CUDA device"


SETTINGS, NO_DEVICE = find_device()


class SkippedModule(pytest.Module):
    """A test module that can't run here; it isn't imported."""

    def collect(self) -> Iterator[Any]:
        pytest.skip(f"{NO_DEVICE} ({standin.VARIABLE}=mode=async asks for the stand-in)")


def pytest_pycollect_makemodule(
    module_path: Path,
    parent: pytest.Collector,
) -> pytest.Module | None:
    if NO_DEVICE is None:
        return None
    module: pytest.Module = SkippedModule.from_parent(parent, path=module_path)
    return module


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.cuda)
    if SETTINGS is not None and item.get_closest_marker("gpu"):
        item.add_marker(pytest.mark.skip(reason="needs a real GPU"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only what a mode has in its share, where `tests.cuda_on_cpu.run` asks for that."""
    mode = os.environ.get(run.MODE)
    if mode:
        others = [item for item in items if not run.runs_in(mode, item.nodeid)]
        items[:] = [item for item in items if run.runs_in(mode, item.nodeid)]
        config.hook.pytest_deselected(items=others)


@pytest.fixture(scope="session")
def standin_settings() -> dict[str, Any] | None:
    """The stand-in's settings; None on a real GPU."""
    return SETTINGS


@pytest.fixture
def room_for() -> Callable[[int], None]:
    """`room_for(nbytes)` skips the test where the current device hasn't so much memory free."""
    import cupy

    def check(nbytes: int) -> None:
        free = cupy.cuda.runtime.memGetInfo()[0] + cupy.get_default_memory_pool().free_bytes()
        if nbytes > free:
            pytest.skip(f"needs {nbytes >> 20} MiB of device memory, {free >> 20} are free")

    return check


@pytest.fixture
def faults(standin_settings: dict[str, Any] | None) -> Iterator[Callable[..., standin.Fault]]:
    """`standin.fail`; all faults end with the test. Skips on a real GPU.

    Garbage isn't collected meanwhile: objects of earlier tests would complain that they can't give
    back their streams to a lost device.
    """
    if standin_settings is None:
        pytest.skip("only the stand-in fails on request")
    gc.collect()
    gc.disable()
    yield standin.fail
    standin.heal()
    gc.enable()
