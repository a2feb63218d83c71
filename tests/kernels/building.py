"""The kernels built for the CPU, as they are or with a bug planted."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpuckpt.devices import kernels
from tests.cuda_on_cpu import build
from tests.cuda_on_cpu.emulator import cuemu

Change = Callable[[str], str]


def library(name: str, *, check: bool = False) -> cuemu.Lib:
    """The kernel, built for the CPU."""
    return cuemu.Lib(_built(kernels.source(name), name, check=check, opt="-O1"))


@contextlib.contextmanager
def mutant(name: str, change: Change) -> Iterator[cuemu.Lib]:
    """The kernel with a bug, under the exact checker; unloaded again, as a process has many."""
    text = change(kernels.source(name))
    broken = cuemu.Lib(_built(text, name, check=True, opt="-O0"))  # in half the time
    try:
        yield broken
    finally:
        dlclose = ctypes.CDLL(None).dlclose
        dlclose.argtypes = [ctypes.c_void_p]
        dlclose(broken.dll._handle)


def _built(text: str, name: str, *, check: bool, opt: str) -> Path:
    try:
        build.compiler()
    except build.MissingError as error:
        pytest.skip(f"the emulator builds kernels: {error}")
    options = kernels.OPTIONS
    return cuemu.host_library_of(text, f"{name}.cu", check=check, options=options, opt=opt)


def without(text: str, at: int = 0) -> Change:
    """Leave out the (at+1)-th occurrence of `text`."""
    return replacing(text, "", at)


def replacing(old: str, new: str, at: int = 0) -> Change:
    def change(source: str) -> str:
        parts = source.split(old)
        assert len(parts) > at + 1, f"there is no {old!r} to change"
        return old.join(parts[: at + 1]) + new + old.join(parts[at + 1 :])

    return change
