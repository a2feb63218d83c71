"""Each of these bugs, planted in a kernel, is found by a test's launch under the exact checker."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cuda_on_cpu.emulator import cuemu
from tests.kernels.building import mutant, replacing, without
from tests.kernels.memory import Launch
from tests.kernels.test_on_cpu import ONE_ROW, SMALL
from tests.kernels.test_statistics import EXPONENT, launch_of, scaled
from tests.kernels.test_strided import launch as launch_runs
from tests.kernels.test_strided import plain
from tests.often import of_this_run

FOUND = (cuemu.KernelError, AssertionError)
BARRIER, WARP = "__syncthreads();", "__syncwarp(ALL);"
# Barriers are counted in the order of the text that is compiled, headers first.
CHUNKS = {
    "no barrier before the row is read": ("filter", without(BARRIER, 0)),
    "no barrier before the chain": ("filter", without(BARRIER, 1)),
    "no barrier before the next leaf": ("filter", without(BARRIER, 2)),
    "no warp barrier after the bytewise load": ("filter", without(WARP, 0)),
    "no warp barrier within the chain": ("filter", without(WARP, 2)),
    "no warp barrier after the difference": ("filter", without(WARP, 4)),
    "no warp barrier before planes are read": ("filter", without(WARP, 5)),
    "no warp barrier before the next tile": ("filter", without(WARP, 7)),
    "a tile counts as full": ("filter", replacing("if (count == TILE) {", "if (count > 9) {")),
    "reads behind the chunk": ("filter", replacing("u + 1 < UNITS || lane < 31", "true")),
    "reads before the chunk": ("filter", replacing("if (u || lane)", "if (true)")),
    "the tail's last byte": ("filter", replacing("i < count; i += 32", "i + 1 < count; i += 32")),
    "one byte beyond a plane": ("filter", replacing("i < count; i += 32", "i <= count; i += 32")),
    "planes too close": (
        "filter",
        replacing("at / ACROSS * stride", "at / ACROSS * (stride - 16)"),
    ),
    "half a mask": ("filter", replacing("(ALL, one, 4)", "(0xffffu, one, 4)")),
    "the grid's stride": ("filter", replacing("+ gridDim.x", "+ gridDim.x + 1")),
    "a leaf's last stripe": ("filter", replacing("if (mine > last) continue;", "")),
    "a borrow between elements": ("filter", replacing("(a | f.high)", "a")),
    "a sign that isn't folded": ("filter", replacing("^ spread(f, d & f.high)", "")),
    "a sign of 8 bytes": ("filter", replacing("^ (0 - (a - b >> 63))", "")),
    "the base of another tile": ("filter", replacing("row.base + begin", "row.base + leaf.begin")),
    "the expected digest of another leaf": (
        "filter",
        replacing("expected + 2 * index", "expected + 2"),
    ),
    "half a digest compared": (
        "filter",
        replacing("lane < 2 && (!expected", "!lane && (!expected"),
    ),
    "a zero byte too few": ("filter", replacing("0x7f7f7f7f | word) >>", "0x7e7f7f7f | word) >>")),
    "odd words' bytes": ("filter", replacing("set.y + odd", "set.y + even")),
    "counts of the leaf before": ("filter", without("counts.set[threadIdx.x] = make_uint2(0, 0);")),
    "a bit that isn't turned": ("filter", replacing("word >> 15 & 0x00010001", "0")),
    "a bit of the other half": (
        "filter",
        replacing("__funnelshift_l(w.x, w.y, 1)", "__funnelshift_l(w.x, w.x, 1)"),
    ),
    "all elements turned": ("filter", replacing("if (row.turned)", "if (row.width > 1)")),
    "turned the wrong way back": ("unfilter", replacing("BACK ? 31 : 1", "1")),
    "no warp barrier before units are read": ("unfilter", without(WARP, 6)),
    "no warp barrier after units are read": ("unfilter", without(WARP, 7)),
    "no warp barrier before units are written": ("unfilter", without(WARP, 5)),
    "a unit beyond the tile": (
        "unfilter",
        replacing("|| lane < 31) __stcs", "|| lane < 32) __stcs"),
    ),
    "a missing byte at a tile's end": (
        "unfilter",
        replacing("lane < UNIT) __", "lane + 1 < UNIT) __"),
    ),
    "reads the padding": ("unfilter", replacing("i < count ? from", "i <= count ? from")),
    "a carry between elements": ("unfilter", replacing("(d & ~f.high) + (b", "d + (b")),
    "a digest of another leaf": ("digest", replacing("2 * leaf.number", "2 * (leaf.number ^ 1)")),
    "a digest's padding": ("digest", replacing("i < count ? __ldcs", "i <= count ? __ldcs")),
}
STATISTICS = {
    "NaNs and infinities swapped": replacing("if (bits > top)", "if (bits < top)"),
    "what isn't finite is summed": replacing("squares < limit", "true"),
    "too small for float32": replacing("0x1p-100f", "0x1p-149f"),
    "a half's infinity": replacing("HALF_TOP = 0x47800000u", "HALF_TOP = 0x47800001u"),
    "a half's subnormals": replacing("half & 0x7fff", "half & 0x7c00"),
    "one lane's slow sum": replacing("i < UNITS * UNIT; i += size", "i < UNIT; i += size"),
    "a float64's upper half": replacing("whole += a * a + b * b", "whole += a * a"),
    "bytes after the end": replacing("threadIdx.x % 32 * UNIT < valid", "0 < valid"),
    "no warp barrier after a slow sum": without(WARP, 6),
    "squares of another warp": replacing("&tiles[w][lane]", "&tiles[0][lane]"),
}
STRIDED = {
    "an axis too few": replacing("axis-- > 0;", "axis-- > 1;"),
    "an end that isn't seen": replacing("extent - along", "extent"),
    "a piece too short": replacing("PIECE = 16384", "PIECE = 16368"),
    "an item beyond the run": replacing("? (u32)(run.count - first) : COUNT", "? COUNT : COUNT"),
    "an unaligned unit": replacing("if (to % UNIT == 0)", "if (true)"),
    "32 bits where there are more": replacing(
        "k * sizeof(Item) % 8 * 8;", "k * sizeof(Item) % 4 * 8;"
    ),
}


@pytest.mark.parametrize("bug", of_this_run(CHUNKS))
def test_a_bug_in_a_kernel_of_chunks_is_found(bug):
    name, change = CHUNKS[bug]
    rows = ONE_ROW if bug == "no barrier before the next leaf" else SMALL
    launch = Launch(rows)
    with mutant(name, change) as broken, pytest.raises(FOUND):
        getattr(launch, name)(broken, 1)


def test_an_in_place_base_that_is_written_too_early_is_found():
    """Without the barrier between them, a lane's bytes may be read after another wrote them."""
    launch = Launch(SMALL)
    with mutant("unfilter", without(WARP, 4)) as broken, pytest.raises(FOUND):
        launch.unfilter_in_place(broken, 1)


def elements(dtype: str, kind: int) -> np.ndarray:
    """Some of each sort; after them only small ones, and many that are zero."""
    bits = scaled(dtype, 3001, 0).astype(np.uint64)
    bits[100:200:7], bits[150:300:9], bits[5:20] = EXPONENT[kind], EXPONENT[kind] | 1, 1
    bits[-500:-100] = 1 if kind != 3 else 1 << 23
    return bits


def count_all_sorts(kernel: cuemu.Lib) -> None:
    types = {"float16": 1, "float32": 3, "float64": 4, "float8_e4m3fn": 5, "float8_e8m0fnu": 5}
    for dtype, kind in types.items():
        launch_of(dtype, elements(dtype, kind)).filter(kernel, 1)
    launch_of("float32", scaled("float32", 2000, -63)).filter(kernel, 1)
    launch_of("float8_e8m0fnu", np.zeros(17, np.uint64)).filter(kernel, 1)


@pytest.mark.parametrize("bug", of_this_run(STATISTICS))
def test_a_bug_in_the_statistics_is_found(bug):
    with mutant("filter", STATISTICS[bug]) as broken, pytest.raises(FOUND):
        count_all_sorts(broken)


def pack_all_sorts(kernel: cuemu.Lib) -> None:
    tensors = [
        plain((90, 70), (1, 0), 4),
        plain((90, 71), (1, 0), 4, packed_off=4),
        plain((33, 3), (1, 0), 1),
        plain((50, 7), (1, 0), 2, first=3, count=11),
    ]
    launch_runs({"gather": kernel}, "gather", tensors)
    for tensor in tensors:
        wanted = tensor.array.tobytes()[tensor.start :][: tensor.packed.size]
        assert tensor.packed.tobytes() == wanted


@pytest.mark.parametrize("bug", of_this_run(STRIDED))
def test_a_bug_in_the_kernels_of_runs_is_found(bug):
    with mutant("gather", STRIDED[bug]) as broken, pytest.raises(FOUND):
        pack_all_sorts(broken)


def test_without_a_bug_nothing_is_found():
    with mutant("filter", str) as kernel:
        Launch(SMALL).filter(kernel, 1)
        count_all_sorts(kernel)
    with mutant("gather", str) as kernel:
        pack_all_sorts(kernel)
