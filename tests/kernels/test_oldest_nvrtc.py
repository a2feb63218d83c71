"""Kernels compile with the oldest NVRTC that a supported CuPy can meet: CUDA 12.0's.

CuPy loads another one, so this one is called as the library that it is (NVRTC's user guide).
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from gpuckpt.devices import kernels
from tests.kernels.test_compile import KERNELS

ARCHITECTURES = (75, 80, 90)  # it knows no later ones


@pytest.fixture(scope="module")
def nvrtc() -> Any:
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations or () if spec else ()
    found = [Path(place) / "cuda_nvrtc" / "lib" / "libnvrtc.so.12" for place in places]
    library = next((path for path in found if path.exists()), None)
    if library is None:
        pytest.skip("needs CUDA 12.0's NVRTC (PyPI: nvidia-cuda-nvrtc-cu12==12.0.140)")
    return ctypes.CDLL(str(library))


def refusal(nvrtc: Any, source: str, architecture: int) -> str:
    """What the compiler says against a source; nothing if it takes it."""
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles(nvrtc, name, architecture):
    assert refusal(nvrtc, kernels.source(name), architecture) == ""


def test_what_it_does_not_know_is_refused(nvrtc):
    source = 'struct S { int a; }; static_assert(__builtin_offsetof(S, a) == 0, "");'
    assert "__builtin_offsetof" in refusal(nvrtc, source, 80)
