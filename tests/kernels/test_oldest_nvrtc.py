"""Kernels compile with the oldest NVRTC that a supported CuPy can meet: CUDA 12.0's.

CuPy loads another one, so this one is called as the library that it is (NVRTC's user guide); in a
process of its own, since it changes the locale.
"""

from __future__ import annotations

import ctypes
import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from gpuckpt.devices import kernels
from tests.kernels.test_compile import KERNELS

ARCHITECTURES = (75, 80, 90)  # it knows no later ones


def library() -> Path | None:
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations or () if spec else ()
    found = (Path(place) / "cuda_nvrtc" / "lib" / "libnvrtc.so.12" for place in places)
    return next((path for path in found if path.exists()), None)


def refusal(path: Path, source: str, architecture: int) -> str:
    """What the compiler says against a source; nothing if it takes it."""
    nvrtc = ctypes.CDLL(str(path))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    code = source.encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), code, b"kernel.cu", 0, None, None) == 0
    options = (*kernels.OPTIONS, f"-arch=sm_{architecture}", "-ftz=true")
    words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    if nvrtc.nvrtcCompileProgram(program, len(options), words) == 0:
        return ""
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.value.decode() or "no word"


@pytest.fixture(scope="module")
def refused() -> Iterator[Callable[[str, int], str]]:
    path = library()
    if path is None:
        pytest.skip("needs CUDA 12.0's NVRTC (PyPI: nvidia-cuda-nvrtc-cu12==12.0.140)")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda source, architecture: pool.submit(refusal, path, source, architecture).result(
            120
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles(refused, name, architecture):
    assert refused(kernels.source(name), architecture) == ""


def test_what_it_does_not_know_is_refused(refused):
    source = 'struct S { int a; }; static_assert(__builtin_offsetof(S, a) == 0, "");'
    assert "__builtin_offsetof" in refused(source, 80)
