"""Each of these bugs, planted in a kernel of deltas, is found under the exact checker."""

from __future__ import annotations

import pytest

from tests.cuda_on_cpu.emulator import cuemu
from tests.kernels.building import mutant, replacing, without
from tests.kernels.copies import Copies
from tests.kernels.test_deltas import SMALL
from tests.often import of_this_run

FOUND = (cuemu.KernelError, AssertionError)
BARRIER = "__syncthreads();"
BUGS = {
    "a byte that isn't zero is missed": ("survey", replacing("0x7f7f7f7f | word)", "0x7f7f7f7f)")),
    "a segment too few": ("survey", replacing("* WARPS + threadIdx.x / 32", "* WARPS")),
    "a segment's end": ("survey", replacing("at < end && at", "at")),
    "one lane's count": ("survey", replacing("u32 step = 16; step;", "u32 step = 16; step > 1;")),
    "what is behind the end counts": ("survey", replacing("if (left < 4)", "if (left < 3)")),
    "another plane's count": ("survey", replacing("found + k, totals[k]", "found + k, totals[0]")),
    "the copies swapped": (
        "survey",
        replacing("(pair.now + at, stride)", "(pair.before + at, stride)"),
    ),
    "counts of another segment": ("survey", replacing(".found) + segment", ".found) + 0")),
    "a piece too few": ("survey", replacing("at += gridDim.x", "at += gridDim.x + 1")),
    "high halves swapped": ("survey", replacing("(u64)ah.y << 32", "(u64)ah.x << 32")),
    "two bytes' elements mixed": ("survey", replacing("a.w[1], 0x7362", "a.w[1], 0x5140")),
    "planes taken as they are, though turned": (
        "survey",
        replacing("return is_turned ? turned<true>(word, width) : word", "return word"),
    ),
    "turned the wrong way": ("pack", replacing("turned<true>(word", "turned<false>(word")),
    "turned though they weren't": ("pack", replacing("stride), pair.turned)", "stride), true)")),
    "a copy of which one half is turned": ("pack", replacing("plain(v.z, 4", "plain(v.z, 2")),
    "lanes that come later": ("pack", replacing("% 32) - 1;", "% 32);")),
    "half a mask": ("pack", replacing("__ballot_sync(ALL,", "__ballot_sync(0xffffu,")),
    "a byte's place": ("pack", replacing("__stcs(to + rank++", "__stcs(to + rank")),
    "the step before": ("pack", replacing("starts[k] += pack_bytes", "pack_bytes")),
    "another plane's beginning": ("pack", replacing("__ldcs(found + 2 * k)", "__ldcs(found)")),
    "another plane's bitmap": ("pack", replacing("found + 2 * k + 1", "found + 1")),
    "a bitmap that has no place": ("pack", replacing("if (bitmap == NONE) continue;", "")),
    "a bitmap's word too many": ("pack", replacing("&& lane * 4 < bits", "")),
    "a bitmap's nibble": ("pack", replacing("set << lane % 8 * 4", "set << lane % 4 * 4")),
    "half a word of a bitmap": ("pack", replacing("step < 8; step *= 2", "step < 4; step *= 2")),
    "a bitmap's place": ("pack", replacing("+ in / 32)", "+ in / 16)")),
    "a plane's end": ("pack", replacing("} else if (at < pair.count)", "} else")),
    "every plane packed": ("pack", replacing("pair.sparse >> k & 1", "pair.sparse")),
    "no barrier before counting": ("sample", without(BARRIER, 0)),
    "no barrier before reading": ("sample", without(BARRIER, 1)),
    "no barrier before the next row": ("sample", without(BARRIER, 2)),
    "samples of the copy before": (
        "sample",
        replacing("[now >> 8 * k & 255]", "[before >> 8 * k & 255]"),
    ),
    "samples taken as they are, though turned": (
        "sample",
        replacing("return is_turned ? (Element)turned<true>((u32)element, width) :", "return"),
    ),
    "samples of one copy turned back": (
        "sample",
        replacing(
            "pair.now + at, pair.stride, width, pair.turned",
            "pair.now + at, pair.stride, width, false",
        ),
    ),
    "samples too near": ("sample", replacing("threadIdx.x * pair.every", "threadIdx.x")),
    "a bin of another": ("sample", replacing("counts[k][v + 1] << 16", "counts[k][v] << 16")),
    "counts of the row before": ("sample", replacing("k < 2 * pair.width", "k < pair.width")),
}


def launch(name: str, kernel: cuemu.Lib) -> None:
    copies = Copies(SMALL)
    work = {"survey": copies.survey_counts, "sample": copies.sample, "pack": copies.pack}
    work[name](kernel, 1)


@pytest.mark.parametrize("bug", of_this_run(BUGS))
def test_a_bug_in_a_kernel_of_deltas_is_found(bug):
    name, change = BUGS[bug]
    with mutant(name, change) as broken, pytest.raises(FOUND):
        launch(name, broken)


@pytest.mark.parametrize("name", ["survey", "sample", "pack"])
def test_without_a_bug_nothing_is_found(name):
    with mutant(name, str) as kernel:
        launch(name, kernel)
