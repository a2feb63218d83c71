"""Makes ``import cupy`` run on the CPU, over the stand-in for CUDA's driver and runtime.

`install` must come before anything imports CuPy. The environment variable `VARIABLE` says in one
word what to install, so that a test run and the processes it starts agree on it:
``GPUCKPT_STANDIN=mode=lazy,devices=2,mem_mb=512,jitter_us=200,seed=3``. A program runs on the
stand-in by ``python -m tests.cuda_on_cpu.standin MODULE [ARGUMENTS]``.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import runpy
import sys
from typing import TYPE_CHECKING, Any

from tests.cuda_on_cpu import build
from tests.cuda_on_cpu.emulator import cuemu

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

VARIABLE = "GPUCKPT_STANDIN"
MODES = ("async", "eager", "lazy")
SETTINGS: dict[str, type[int | float | str]] = {
    "mode": str,  # async: a thread for each stream; eager: each call completes; lazy: on a wait
    "devices": int,
    "mem_mb": int,  # of each device
    "jitter_us": int,  # a random delay of up to this before each of a stream's operations
    "seed": int,  # of the jitter
    "d2h_gbps": float,  # speed of copies to the host; 0: as fast as they go
    "h2d_gbps": float,
    "order": int,  # of a block's threads: 0 forward, 1 reverse, n random
    "check": int,  # 1: kernels run under the exact memory checker, slowly
    "trace": int,  # 2: every copy, allocation and launch on stderr
}
REPLACED = "cupy_backends.cuda.api.runtime"
HEADER = b"CUEMUSO1"  # then the size in 8 bytes, then a host library


class Finder:
    """Finds CuPy's runtime module where the stand-in's build put it."""

    @staticmethod
    def find_spec(name: str, _path: Sequence[str] | None = None, _target: Any = None) -> Any:
        if name != REPLACED:
            return None
        path = str(build.location() / build.RUNTIME)
        loader = importlib.machinery.ExtensionFileLoader(name, path)
        return importlib.util.spec_from_file_location(name, path, loader=loader)


def available() -> str | None:
    """None if the stand-in is built and current, else the reason why it can't be installed."""
    return build.reason_unbuilt()


def parse(text: str) -> dict[str, Any]:
    """The settings that `VARIABLE` names, as `install` takes them."""
    settings = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in SETTINGS:
            raise ValueError(f"{VARIABLE}: no setting {name!r}; there are {', '.join(SETTINGS)}")
        settings[name] = SETTINGS[name](value)
    return settings


def install(**settings: float | str) -> None:
    """Installs the stand-in with these `SETTINGS` and imports CuPy on it."""
    settings.setdefault("mode", "async")
    if unknown := settings.keys() - SETTINGS.keys():
        raise TypeError(f"no such settings: {', '.join(sorted(unknown))}")
    if settings["mode"] not in MODES:
        raise ValueError(f"mode is one of {', '.join(MODES)}, not {settings['mode']!r}")
    if "cupy" in sys.modules:
        raise RuntimeError("the stand-in must be installed before anything imports cupy")
    if reason := available():
        raise RuntimeError(reason)
    for name in SETTINGS:
        os.environ.pop(f"STUBCUDA_{name.upper()}", None)
    for name, value in settings.items():
        os.environ[f"STUBCUDA_{name.upper()}"] = str(value)
    check = bool(settings.get("check"))
    os.environ["CUPY_CACHE_DIR"] = str(build.location() / ("checked" if check else "kernels"))
    os.environ["CUPY_ACCELERATORS"] = ""  # CUB's kernels are beyond the emulator
    ctypes.CDLL(str(build.location() / build.LIBRARY), mode=ctypes.RTLD_GLOBAL)
    sys.meta_path.insert(0, Finder)
    emulate_kernels(check=check)


def install_from_environment() -> dict[str, Any] | None:
    """Installs what `VARIABLE` says; returns the settings, or None where it says nothing."""
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    settings = parse(text)
    install(**settings)
    return settings


def emulate_kernels(*, check: bool) -> None:
    """Has CuPy's compiler give libraries for the CPU, after NVRTC found no error in the source."""
    compiler: ModuleType = importlib.import_module("cupy.cuda.compiler")
    base: Any = compiler._NVRTCProgram

    class Program(base):  # type: ignore[misc]
        def compile(self, options: Sequence[str] = (), log_stream: Any = None) -> Any:
            compiled = super().compile(options, log_stream)
            if self.method != "cubin":
                return compiled
            names = tuple(self.name_expressions or ())
            library = cuemu.host_library_of(
                self.src,
                self.name,
                check=check,
                options=options,
                expressions=names,
            ).read_bytes()
            image = HEADER + len(library).to_bytes(8, "little") + library
            return image, {name: name for name in names}

    compiler.__dict__["_NVRTCProgram"] = Program


def main() -> None:
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    os.environ.setdefault(VARIABLE, "mode=async")
    install_from_environment()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
