"""The emulator's memory checker: it reports what is wrong on a GPU, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.cuda_on_cpu import build
from tests.cuda_on_cpu.emulator import cuemu

WORDS = 64
OUTSIDE = "shared memory access out of bounds"
# A warp's threads share `t`; each kernel's body stands between the fill and the end.
KERNEL = """
extern "C" __global__ void k(unsigned *out, unsigned far) {{
  __shared__ unsigned t[64];
  const unsigned me = threadIdx.x, lane = me % 32;
  unsigned got = 0;
  t[me] = me;
  __syncthreads();
  {body}
  out[me] = got;
}}
"""
BARRIER = "__syncwarp();"
# Lane 0 writes, lane 2 reads, and each of them meets lane 1.
CHAIN = """
  if (me == 0) t[0] = 9;
  for (unsigned mask : {{{first}u, {then}u}}) if (me < 32 && mask >> lane & 1) __syncwarp(mask);
  if (me == 2) got = t[0];
"""
RIGHT = {
    "one writes what all have read": f"got = t[0]; {BARRIER} if (me == 0) t[0] = 9;",
    "one writes what it read last": f"""
      if (me == 0) got = t[0];
      {BARRIER}
      if (me == 1) {{ got = t[0]; t[0] = 9; }}""",
    "half a warp by itself": """
      if (lane < 16) { t[me] = 2 * me; __syncwarp(0xffff); got = t[me ^ 1]; }""",
    "both halves by themselves": """
      const unsigned half = lane < 16 ? 0xffff : 0xffff0000;
      t[me] = 2 * me;
      __syncwarp(half);
      got = t[me ^ 1];""",
    "from lane to lane": CHAIN.format(first=3, then=6),
    "several warps read, then a barrier": "got = t[0]; __syncthreads(); if (me == 40) t[0] = 9;",
}
WRONG = {
    "one writes what others read": ("got = t[0]; if (me == 0) t[0] = 9;", "race"),
    "one writes what another warp read": (f"got = t[0]; {BARRIER} if (me == 0) t[0] = 9;", "race"),
    "the barrier of one half for both": (
        "t[me] = 2 * me; if (lane < 16) __syncwarp(0xffff); got = t[me ^ 16];",
        "race",
    ),
    "from lane to lane in the wrong order": (CHAIN.format(first=6, then=3), "race"),
    "a read before, and one after, of the other's": (
        f"if (me == 0) got = t[5]; {BARRIER} if (me == 1) got = t[5]; if (me == 0) t[5] = 9;",
        "race",
    ),
    "a shuffle orders no memory": (
        "t[me] = 9; __shfl_sync(~0u, 0, 0); got = t[me ^ 1];",
        "race",
    ),
    "just beyond": ("unsigned *p = t; p[me + 1] = 9;", OUTSIDE),
    "far beyond": ("unsigned *p = t; if (me == 0) p[far] = 9;", OUTSIDE),
    "a read beyond": ("unsigned *p = t; got = p[far];", OUTSIDE),
}
ORDERS = (0, 1, 7)  # of a block's threads: the report doesn't depend on it


def library(body: str, *, check: bool = True) -> cuemu.Lib:
    try:
        build.compiler()
    except build.MissingError as error:
        pytest.skip(f"the emulator builds kernels: {error}")
    return cuemu.Lib(cuemu.host_library_of(KERNEL.format(body=body), "k.cu", check=check))


def launch(lib: cuemu.Lib, *, threads: int, far: int = 40_000, grid: int = 1) -> Any:
    out = np.zeros(WORDS, np.uint32)
    if hasattr(lib.dll, "cuemu_regions"):
        lib.regions(out)
    lib.launch("k", grid, threads, [out, far])
    return out


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", RIGHT)
def test_what_is_right_is_not_reported(case, order):
    lib = library(RIGHT[case])
    lib.set(order=order)
    launch(lib, threads=64 if "several warps" in case else 32)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_reported(case, order):
    body, report = WRONG[case]
    lib = library(body)
    lib.set(order=order)
    with pytest.raises(cuemu.KernelError, match=report):
        launch(lib, threads=64)


def test_what_several_blocks_read_the_next_launch_may_write():
    words = np.zeros(WORDS, np.uint32)
    lib = library("if (far) out[me] = 1; else t[me] = out[0]; return;")
    lib.regions(words)
    lib.launch("k", 3, 64, [words, 0])
    lib.launch("k", 1, 64, [words, 1])
    assert words.tolist() == [1] * WORDS
    with pytest.raises(cuemu.KernelError, match="race"):
        lib.launch("k", 2, 64, [words, 1])


def test_without_the_checker_a_block_that_wrote_beyond_shared_memory_is_reported():
    lib = library("unsigned *p = t; p[me + far] = 9;", check=False)
    launch(lib, threads=64, far=0)
    with pytest.raises(cuemu.KernelError, match="a write beyond its shared memory"):
        launch(lib, threads=64, far=1)
    launch(lib, threads=64, far=0)
