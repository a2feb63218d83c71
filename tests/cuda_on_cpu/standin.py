"""Makes ``import cupy`` run on the CPU, over the stand-in for CUDA's driver and runtime.

`install` must come before anything imports CuPy. The environment variable `VARIABLE` says in one
word what to install, so that a test run and the processes it starts agree on it:
``GPUCKPT_STANDIN=mode=lazy,devices=2,mem_mb=512,jitter_us=200,seed=3``. A program runs on the
stand-in by ``python -m tests.cuda_on_cpu.standin MODULE_OR_FILE [ARGUMENTS]``.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import importlib.util
import os
import runpy
import sys
from typing import TYPE_CHECKING, Any, Literal

from tests.cuda_on_cpu import build
from tests.cuda_on_cpu.emulator import cuemu

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
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
    settings = {"mode": "async"} | parse(text)
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


def driver() -> ctypes.CDLL:
    """The stand-in's library, once it is installed; RuntimeError if it isn't."""
    loaded = ctypes.CDLL(None)
    if not hasattr(loaded, "stubcuda_counts"):
        raise RuntimeError("the stand-in isn't installed in this process")
    loaded.stubcuda_count_name.restype = ctypes.c_char_p
    loaded.stubcuda_struck.restype = ctypes.c_longlong
    return loaded


def counts(thread: Literal["current", "all"] = "current") -> dict[str, int]:
    """How much work the driver was given so far, by this thread or by all; it only grows.

    `launch` kernels; `copy` copies and fills; `host_sync` calls that wait for a stream, an event
    or the device, synchronous copies, and copies from or to pageable memory, whether or not there
    was something to wait for; `alloc`, `free` device memory (freeing waits for the device, too);
    `host_alloc`, `host_free` page-locked memory; `event_record`; `stream_wait` streams that wait
    for an event.
    """
    loaded = driver()
    names: list[str] = []
    while name := loaded.stubcuda_count_name(len(names)):
        names.append(name.decode())
    values = (ctypes.c_longlong * len(names))()
    loaded.stubcuda_counts(int(thread == "all"), values)
    return dict(zip(names, values, strict=True))


class Counting:
    """What the driver was given in a `counting` block, by the names that `counts` explains."""

    def __init__(self) -> None:
        self._own, self._all = counts("current"), counts("all")
        self.current: dict[str, int] = {}  # by the block's own thread
        self.total: dict[str, int] = {}  # by all threads meanwhile

    def stop(self) -> None:
        self.current = {name: n - self._own[name] for name, n in counts("current").items()}
        self.total = {name: n - self._all[name] for name, n in counts("all").items()}


@contextlib.contextmanager
def counting() -> Iterator[Counting]:
    """Counts the block's work; the numbers are there when the block has ended."""
    counted = Counting()
    try:
        yield counted
    finally:
        counted.stop()


class Fault:
    """A call that was told to fail."""

    def __init__(self, number: int) -> None:
        self._number = number

    @property
    def struck(self) -> int:
        """How many calls it has made fail; a test whose fault never struck shows nothing."""
        return int(driver().stubcuda_struck(self._number))


def fail(call: str, *, error: int, after: int = 0, times: int = 1, sticky: bool = False) -> Fault:
    """Makes the next calls of `call` but `after` return `error` and do nothing, `times` times.

    `call` is an entry that needs a context, of the driver (`cuLaunchKernel`, `cuMemAlloc`) or of
    the runtime (`cudaMalloc`), whose calls go on to the driver's. `cuMemcpyAsync` and `cuMemcpy`
    stand for every kind of copy. With `sticky` the context is lost with it, as by an illegal
    address (700), a failed launch (719) or an ECC error (214): what it was given is dropped, and
    each of its calls returns `error` until `heal`. Any thread may call this, and is meant by it.
    """
    loaded = driver()
    if not (hasattr(loaded, call) or hasattr(loaded, f"{call}_v2")):
        raise ValueError(f"the stand-in has no call {call!r}")
    skipped, often = ctypes.c_longlong(after), ctypes.c_longlong(times)
    return Fault(loaded.stubcuda_fail(call.encode(), skipped, error, often, int(sticky)))


def heal() -> None:
    """Ends all faults and brings lost contexts back, once what they had been given is dropped."""
    driver().stubcuda_heal()


def main() -> None:
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    os.environ.setdefault(VARIABLE, "mode=async")
    install_from_environment()
    del sys.argv[0]
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
